"""The results of the faults, and the tables of docs/reliability.md."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from common.report.tables import format_table

from faults.outcome import Outcome
from faults.readers import Counts

_HERE = Path(__file__).parent
RESULTS = _HERE / "results" / "faults.json"


def record(
    file: Path, outcomes: Sequence[Outcome], counts: Mapping[str, Counts], keep: bool
) -> None:
    """Writes results to a file; `keep` those that are there of other faults and readers."""
    old = _read(file) if keep and file.exists() else {"faults": [], "readers": {}}
    rows = {row["fault"]: row for row in old["faults"]}
    rows |= {outcome.fault: outcome._asdict() for outcome in outcomes}
    readers = old["readers"] | {name: counted._asdict() for name, counted in counts.items()}
    new = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "faults": list(rows.values()),
        "readers": readers,
    }
    file.write_text(json.dumps(new, indent=2) + "\n")


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
        for fault in _read(RESULTS)["faults"]
    ]
    return format_table(("fault", "tried", "as here", "what happens", "what is lost"), rows)


def readers_table() -> str:
    """One row per reader: how its cases ended."""
    rows = [
        (name, *(f"{count:,}" for count in counts.values()))
        for name, counts in _read(RESULTS)["readers"].items()
    ]
    header = ("reader", "files", "read right", "refused", "read wrong", "other errors")
    return format_table(header, rows)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())
