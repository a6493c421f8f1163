"""The tables of docs/reliability.md, from the results."""

import json
from pathlib import Path

from common.report.tables import format_table

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "faults.json"


def faults_table() -> str:
    """One row per fault: how often it was tried, what happened, what was lost."""
    record = json.loads(RESULTS.read_text())
    rows = [
        (
            fault["fault"],
            str(fault["tried"]),
            str(fault["tried"] - len(fault["problems"])),
            fault["happens"],
            fault["lost"],
        )
        for fault in record["faults"]
    ]
    return format_table(("fault", "tried", "as here", "what happens", "what is lost"), rows)
