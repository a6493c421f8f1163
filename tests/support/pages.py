"""The code that README.md and the pages below docs/ show."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def block(name):
    """The Python block that follows `<!-- tested: name -->` in exactly one of the pages."""
    pattern = rf"<!-- tested: {name} -->\n```python\n(.*?)```"
    (found,) = [code for page in PAGES for code in re.findall(pattern, page.read_text(), re.DOTALL)]
    return found
