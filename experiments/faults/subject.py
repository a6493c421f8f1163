"""The run that faults are tried on: a short study of the digits, as a person starts it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from common.report import deploy
from common.report.workdir import read_metrics
from common.training.checkpoints import newest_step

_SCRIPT = Path(__file__).parents[1] / "digits.py"
# A checkpoint every 4 of 160 steps, so that many are being written when a fault comes.
CONFIG: Mapping[str, Any] = {
    "constraint": "ternary",
    "methods": "('cbp',)",
    "steps_per_epoch": 20,
    "pretrain_epochs": 2,
    "epochs": 6,
    "patience": 1,
    "checkpoint_steps": 4,
    "keep_checkpoints": 3,
    "figures": False,
}
RUNS = ("pretrain", "ternary")
_TIMEOUT = 600  # seconds; a run takes about ten
# Differ between runs that are the same.
_TIMES = {"seconds": None, "images_per_second": None}


class Ended(NamedTuple):
    """A process that has ended."""

    status: int
    printed: str

    @property
    def in_one_line(self) -> bool:
        """Whether it gave up with a line for a person, not a traceback."""
        return self.status == 1 and "error: " in self.printed and "Traceback" not in self.printed


def start(workdir: Path, hash_seed: int = 0, **changes: Any) -> subprocess.Popen[str]:
    """Starts the study, or resumes it."""
    flags = [f"--config.{name}={value}" for name, value in {**CONFIG, **changes}.items()]
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "XLA_FLAGS": ""}
    return subprocess.Popen(
        [sys.executable, str(_SCRIPT), f"--workdir={workdir}", *flags],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> Ended:
    """Waits for a process."""
    printed, _ = process.communicate(timeout=_TIMEOUT)
    return Ended(process.returncode, printed)


def finish(workdir: Path, **changes: Any) -> Ended:
    """Runs the study to its end."""
    return end(start(workdir, **changes))


def wait_for(process: subprocess.Popen[str], event: Callable[[], bool]) -> bool:
    """Waits until something has happened; False if the process ended before."""
    while process.poll() is None:
        if event():
            return True
        time.sleep(0.002)
    return False


def result(workdir: Path) -> dict[str, Any]:
    """What a finished study left, without times: equal results are equal to the bit.

    Of each run: what was logged, the check sum of every array of its state, and the packed file.
    """
    found: dict[str, Any] = {}
    for name in RUNS:
        run = workdir / name
        step = newest_step(run / "checkpoints")
        about = json.loads((run / f"checkpoints/{step}/about/metadata").read_text())
        found[f"{name}: state"] = (step, json.loads(about["text"])["trees"])
        found[f"{name}: metrics"] = [row | _TIMES for row in read_metrics(run)]
        found[f"{name}: summary"] = json.loads((run / "summary.json").read_text()) | _TIMES
        packed = run / deploy.PACKED_FILE
        found[f"{name}: packed"] = packed.exists() and hashlib.sha256(packed.read_bytes()).digest()
    return found


def difference(workdir: Path, reference: Mapping[str, Any]) -> str:
    """Names what differs from the result of a run that met no fault; empty if nothing does."""
    found = result(workdir)
    return ", ".join(name for name in reference if found.get(name) != reference[name])


def resumed_problem(workdir: Path, reference: Mapping[str, Any], **changes: Any) -> str:
    """Reruns the command; empty if it ends as if nothing had happened."""
    ended = finish(workdir, **changes)
    if ended.status:
        return f"status {ended.status} on resuming: {ended.printed[-300:]}"
    return difference(workdir, reference)


def saved_step(printed: str) -> int | None:
    """The step at which a process says that it has saved."""
    found = re.findall(r"stopped at step ([\d,]+) of", printed)
    return int(found[-1].replace(",", "")) if found else None


def first_step(printed: str) -> int | None:
    """The step at which a process says that it goes on."""
    found = re.findall(r"step ([\d,]+) of [\d,]+\n", printed)
    return int(found[0].replace(",", "")) if found else None
