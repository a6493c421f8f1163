"""Puts the tables that runs wrote below `experiments/results` into README.md, between their markers.

python experiments/digits.py --workdir=experiments/results/digits && python experiments/update_readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for table in sorted((ROOT / "experiments" / "results").glob("*/table.md")):
        name = table.parent.name
        text, found = re.subn(
            rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)",
            lambda match, table=table: match[1] + table.read_text() + match[2],  # type: ignore[misc]
            text,
            flags=re.DOTALL,
        )
        print(f"{name}: {'updated' if found else 'README.md has no place for it'}")
    readme.write_text(text)


if __name__ == "__main__":
    main()
