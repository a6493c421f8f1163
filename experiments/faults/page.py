"""The tables of docs/reliability.md, from the results."""

import json
from pathlib import Path
from typing import Any

from common.report.tables import format_table

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "faults.json"


def faults_table() -> str:
    """One row per fault: how often it was tried, what happened, what was lost."""
    rows = [
        (
            fault["fault"],
            str(fault["tried"]),
            str(fault["tried"] - len(fault["problems"])),
            fault["happens"],
            fault["lost"],
        )
        for fault in _record()["faults"]
    ]
    return format_table(("fault", "tried", "as here", "what happens", "what is lost"), rows)


def readers_table() -> str:
    """One row per reader: how its cases ended."""
    rows = [
        (name, *(f"{count:,}" for count in counts.values()))
        for name, counts in _record()["readers"].items()
    ]
    header = ("reader", "files", "read right", "refused", "read wrong", "other errors")
    return format_table(header, rows)


def _record() -> dict[str, Any]:
    return json.loads(RESULTS.read_text())
