"""Processes that are killed, or asked to stop, at random moments."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faults import subject
from faults.outcome import RIGHT

# (process, workdir) -> whether it is still there at the moment to kill it.
Moment = Callable[[subprocess.Popen[str], Path], bool]
_STATUS = {  # that each signal may end in: in the loop, or outside
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (0, -signal.SIGTERM),
    signal.SIGINT: (130,),
}


def at_random(rng: np.random.Generator, seconds: float) -> Moment:
    """Any time within a run of so many seconds, imports included; fewer if runs turn out faster."""

    def moment(process: subprocess.Popen[str], workdir: Path) -> bool:
        nonlocal seconds
        del workdir
        until = time.monotonic() + rng.uniform(0.2, 1) * seconds
        alive = subject.wait_for(process, lambda: time.monotonic() > until)
        if not alive:
            seconds *= 0.8
        return alive

    return moment


def while_saving(rng: np.random.Generator) -> Moment:
    """Within 40 ms of the beginning of a checkpoint, one of the next ten."""

    def moment(process: subprocess.Popen[str], workdir: Path) -> bool:
        seen: set[Path] = set()
        count = int(rng.integers(1, 10))

        def event() -> bool:
            seen.update(workdir.glob("*/checkpoints/*orbax-checkpoint-tmp*"))
            return len(seen) >= count

        alive = subject.wait_for(process, event)
        time.sleep(rng.uniform(0, 0.04))
        return alive and process.poll() is None

    return moment


def stopped(
    folder: Path,
    reference: Mapping[str, Any],
    number: signal.Signals,
    moment: Moment,
    runs: int,
    times: int,
) -> Iterator[str]:
    """Stops each of several runs a number of times, then compares what it ends with.

    Args:
      folder: for the runs.
      reference: the result without faults.
      number: of the signal.
      moment: when to send it.
      runs: how many.
      times: how often each is stopped, if it does not end before.

    Yields:
      For each signal RIGHT, or what went wrong; a run that ends otherwise counts for its last one.
    """
    for index in range(runs):
        workdir, before = folder / f"{number.name}_{index}", ""
        problems: list[str] = []
        for _ in range(times):
            process = subject.start(workdir)
            alive = moment(process, workdir)
            if alive:
                process.send_signal(number)
            ended = subject.end(process)
            if problems:
                problems[-1] = problems[-1] or _went_back(before, ended.printed)
            if not alive:
                break
            problems.append(_wrong_end(ended, number))
            before = ended.printed
        if problems:
            problems[-1] = problems[-1] or subject.resumed_problem(workdir, reference)
        yield from problems


def _wrong_end(ended: subject.Ended, number: signal.Signals) -> str:
    # A run that ends at the same moment has ended well.
    # Python gives up its handlers before it exits.
    shut_down = ended.status == -number and "written to" in ended.printed
    if ended.status not in (0, *_STATUS[number]) and not shut_down:
        return f"status {ended.status} after {number.name}: {ended.printed[-300:]}"
    if "Traceback" in ended.printed:
        return f"a traceback after {number.name}: {ended.printed[-300:]}"
    return RIGHT


def _went_back(before: str, after: str) -> str:
    """What is wrong if a process said that it saved, and the next began elsewhere."""
    saved, begins = subject.saved_step(before), subject.first_step(after)
    if saved is None or begins is None or saved == begins:
        return RIGHT
    return f"saved step {saved}, and went on from {begins}"
