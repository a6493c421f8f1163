"""The documentation site: `sphinx-build -W docs build/docs`. It needs no network.

DOCS_NOTEBOOKS says which notebooks are executed: "quick", all but the tutorials (the default);
"all"; or "none". DOCS_REPOSITORY is where links to files outside docs/ lead.
"""

import configparser
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util import logging

import cbp_jax

DOCS = Path(__file__).parent
ROOT = DOCS.parent
INCLUDED = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md"}  # pages that show them
NOT_EXECUTED = {"quick": ["tutorials/*"], "all": [], "none": ["*"]}

_setup = configparser.ConfigParser()
_setup.read(ROOT / "setup.cfg")
REPOSITORY = os.environ.get("DOCS_REPOSITORY", _setup["metadata"]["url"])


def not_executed(notebooks: str) -> list[str]:
    """The patterns of the notebooks that are shown without being executed."""
    if notebooks not in NOT_EXECUTED:
        known = ", ".join(map(repr, NOT_EXECUTED))
        raise ValueError(f"DOCS_NOTEBOOKS must be one of {known}, got {notebooks!r}")
    return NOT_EXECUTED[notebooks]


project = "cbp_jax"
author = "cbp_jax authors"
release = version = cbp_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
smartquotes = False  # "ternary" is a string
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "cbp_jax"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "repository_url": REPOSITORY,
    "path_to_docs": "docs",
    "use_repository_button": True,
    "use_issues_button": True,
    "navbar_persistent": [],  # the sidebar has a search field
    "show_toc_level": 2,
}

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4  # the anchors that GitHub gives

nb_execution_mode = "force"
nb_execution_excludepatterns = not_executed(os.environ.get("DOCS_NOTEBOOKS", "quick"))
nb_execution_timeout = 180  # seconds per cell
nb_execution_in_temp = True
nb_execution_show_tb = True  # a failing cell is a warning, which -W makes an error
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # would come from the network

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

default_role = "py:obj"  # docstrings write `code` as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures are taken from the source, where types have short names
python_maximum_signature_line_length = 80
napoleon_use_rtype = False


def repository_path(docname: str, link: str) -> str:
    """The path from the repository's root of what a page links to."""
    start = ROOT if docname in INCLUDED else (DOCS / docname).parent
    return Path(os.path.normpath(start / link)).relative_to(ROOT).as_posix()


def page_of(path: str) -> str | None:
    """The page of the site that shows a file of the repository, if there is one."""
    included = {file: page for page, file in INCLUDED.items()}
    if path in included:
        return included[path]
    is_page = path.startswith("docs/") and path.endswith(".md") and (ROOT / path).is_file()
    return path.removeprefix("docs/").removesuffix(".md") if is_page else None


def address(path: str, anchor: str = "") -> str:
    """Where a file or folder of the repository can be read."""
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{path}" + (f"#{anchor}" if anchor else "")


class RepositoryLinks(SphinxTransform):
    """Makes links that work in a checkout work here: to a page, or else to the repository."""

    default_priority = 500

    def apply(self, **kwargs: object) -> None:
        """Replaces links to what is no page below docs/."""
        docname = self.env.docname
        for node in list(self.document.findall(_is_path)):
            link, _, anchor = node["reftarget"].partition("#")
            if node.get("refdomain") == "doc":  # the parser takes any .md for a page
                if link in self.env.found_docs:
                    continue
                link, anchor = f"{link}.md", node["reftargetid"] or ""
            try:
                path = repository_path(docname, link)
            except ValueError:
                path = ""
            if not path or not (ROOT / path).exists():
                logging.getLogger(__name__).warning("no such file: %s", link, location=node)
            elif page := page_of(path):
                attributes = {"refdomain": "doc", "reftarget": page, "reftargetid": anchor or None}
                node.replace_self(
                    addnodes.pending_xref("", *node.children, **node.attributes | attributes)
                )
            elif not path.startswith("docs/"):  # a file below docs/ can be downloaded
                url = address(path, anchor)
                node.replace_self(nodes.reference("", "", *node.children, refuri=url))


def _is_path(node: nodes.Node) -> bool:
    kinds = addnodes.pending_xref, addnodes.download_reference
    if not isinstance(node, kinds) or node.get("reftype") != "myst":
        return False
    return node["refdomain"] == "doc" or not node["reftarget"].startswith("#")


def restructured(lines: list[str]) -> list[str]:
    """A docstring, whose text is Markdown, in reStructuredText.

    What is indented after an empty line is code; a letter may follow a backtick; and what is
    returned has no name before a colon.
    """
    made: list[str] = []
    indent = inside = 0  # of the last line of text, and of the block of code if not 0
    previous = ""
    for line in re.sub(r"(`[^`]+`)(\w?)", _separated, "\n".join(lines)).split("\n"):
        text = line.lstrip()
        here = len(line) - len(text)
        if text:
            if here < inside:
                inside = 0
            if not inside and made and not previous and here >= indent + 4:
                made += [" " * indent + ".. code-block:: none", ""]
                inside = here
            if not inside:
                indent = here
        made.append(f"{' ' * here}: {text}" if previous == "Returns:" else line)
        previous = text
    return made


def _separated(code: re.Match[str]) -> str:
    return "\\ ".join(filter(None, code.groups()))


def _process_docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    inherited = what == "data" or (lines and lines[0].startswith("Alias for field number"))
    lines[:] = [] if inherited else restructured(lines)
    if what in ("attribute", "property"):  # napoleon takes what stands before a colon for a type
        lines[:] = [line.replace(":", " –") for line in lines]


def written_signature(function: Callable[..., object]) -> tuple[str, str]:
    """The arguments and the returned type as the source spells them, without `self`."""
    head = inspect.getsource(function).partition('"""')[0]
    found = re.search(r"def \w+\(\s*(?:self,\s*)?(.*)\) -> (.*):\s*$", head, re.DOTALL)
    assert found, f"{function.__name__} has no annotations or no docstring"
    return f"({' '.join(found[1].split())})", found[2]


def _process_signature(
    app: Sphinx,
    what: str,
    name: str,
    obj: object,
    options: object,
    signature: str | None,
    returns: str | None,
) -> tuple[str | None, str | None]:
    if inspect.isfunction(obj):
        return written_signature(obj)
    return ("", None) if hasattr(obj, "_fields") else (signature, returns)


def setup(app: Sphinx) -> None:
    """Adds what Sphinx has no extension for."""
    app.add_transform(RepositoryLinks)
    app.connect("autodoc-process-docstring", _process_docstring, priority=100)  # before napoleon
    app.connect("autodoc-process-signature", _process_signature)
