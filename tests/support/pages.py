"""The project's pages, README.md and those below docs/: their code, links and lengths."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def block(name):
    """The Python block that follows `<!-- tested: name -->` in exactly one of the pages."""
    pattern = rf"<!-- tested: {name} -->\n```python\n(.*?)```"
    (found,) = [code for page in PAGES for code in re.findall(pattern, page.read_text(), re.DOTALL)]
    return found


def prose_words(page):
    """How many words a page has, without code blocks, tables, images and comments."""
    text = _COMMENT.sub("", _FENCE.sub("", page.read_text()))
    lines = [line for line in text.splitlines() if not line.startswith(("|", "!["))]
    return len(" ".join(lines).split())


def broken_links(page):
    """The relative links of a page that lead to no file, or to no heading of one."""
    links = _LINK.findall(re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text())))
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    return [link for link in relative if not _resolves(page, *link.partition("#")[::2])]


def _resolves(page, path, anchor):
    target = page.parent / path if path else page
    return target.exists() and (not anchor or anchor in _anchors(target))


def _anchors(page):
    """The names that GitHub gives to the headings of a page; the second of a name ends in -1."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    anchors = []
    for heading in headings:
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        earlier = sum(anchor == name for anchor in anchors)
        anchors.append(f"{name}-{earlier}" if earlier else name)
    return anchors
