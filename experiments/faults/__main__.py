"""Tries faults on real runs and readers, and writes docs/reliability.md.

    cd experiments && python -m faults
    cd experiments && python -m faults --only=saving,full --cases=0

It takes about an hour on two CPU cores. Mounting the small disks needs root, and `.pth` files need
torch; without, these rows are left out.
"""

import logging
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import update_pages
from absl import app, flags

from faults import damage, disks, kills, neighbours, numbers, page, subject
from faults.outcome import tally
from faults.readers import READERS

_OUT = flags.DEFINE_string("out", str(page.RESULTS), "Where the results go.")
_ONLY = flags.DEFINE_list("only", [], "Names of `faults` to try; results of others are kept.")
_SAMPLE = flags.DEFINE_bool("sample", False, "Try each once.")
_CASES = flags.DEFINE_integer("cases", 10_000, "Files to try on each reader; 0: keep the results.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and places.")
_SETTINGS: Sequence[Mapping[str, Any]] = [
    {"optimizer": "adamw"},
    {"batch_size": 16},
    {"channels": 8},
    {"epochs": 2},
]
_DIVERGING: Sequence[Mapping[str, Any]] = [{"learning_rate": 1e30}, {"learning_rate": "nan"}]


class Fault(NamedTuple):
    """A row of the page, before it is tried."""

    name: str
    happens: str
    lost: str
    trials: Callable[[], Iterator[str]]


def faults(folder: Path, rng: np.random.Generator, few: bool) -> dict[str, Fault]:
    """Everything to try, by short names, on runs in a folder that may be thrown away."""

    def count(whole: int) -> int:
        return 1 if few else whole

    undisturbed = folder / "undisturbed"
    subject.finish(undisturbed)  # compiles
    started = time.monotonic()
    subject.finish(folder / "timed")
    seconds = time.monotonic() - started
    reference = subject.result(undisturbed)
    half = damage.interrupted(folder)
    at_random, taken_again = (
        kills.at_random(rng, seconds),
        "steps since the newest checkpoint, taken again",
    )

    def stopped(number: signal.Signals, moment: kills.Moment, runs: int, times: int) -> Any:
        return lambda: kills.stopped(
            folder / f"{number.name}_{runs}", reference, number, moment, count(runs), count(times)
        )

    def damaged(what: damage.Damage, trials: int, refusal: str = "") -> Any:
        return lambda: damage.damaged(half, folder, reference, what, rng, count(trials), refusal)

    found = {
        "killed": Fault(
            "SIGKILL at a random moment",
            "the same command resumes, and ends with the same bits",
            taken_again,
            stopped(signal.SIGKILL, at_random, 12, 4),
        ),
        "saving": Fault(
            "SIGKILL while a checkpoint is written",
            "likewise; what was half written is ignored",
            taken_again,
            stopped(signal.SIGKILL, kills.while_saving(rng), 6, 5),
        ),
        "terminated": Fault(
            "SIGTERM at a random moment",
            "the loop saves and says so; elsewhere the process ends at once; resumes",
            "in the loop, nothing",
            stopped(signal.SIGTERM, at_random, 4, 3),
        ),
        "interrupted": Fault(
            "Ctrl-C at a random moment",
            "likewise, in one line",
            "in the loop, nothing",
            stopped(signal.SIGINT, at_random, 4, 3),
        ),
        "full": Fault(
            "the disk is full from a random moment on",
            "one line says what is missing; resumes once there is room",
            taken_again,
            lambda: disks.full(folder, reference, rng, seconds, count(12)),
        ),
        "read_only": Fault(
            "the disk is read-only when a run is to resume",
            "likewise, once it may be written",
            "nothing",
            lambda: disks.read_only(half, folder, reference, count(3)),
        ),
        "checkpoint": Fault(
            "a file of the newest checkpoint is changed in a bit, cut or removed",
            "a warning; the checkpoint before is taken",
            "steps since that one, taken again",
            damaged(damage.newest_checkpoint, 40),
        ),
        "config": Fault(
            "`config.json` is cut",
            "one line names it",
            "that file",
            damaged(damage.config, 4, "config.json"),
        ),
        "metrics": Fault(
            "the last line of `metrics.jsonl` is cut",
            "it is left out",
            "nothing",
            damaged(damage.metrics, 4),
        ),
        "pair": Fault(
            "the same command twice at once",
            "the second refuses in one line, and touches nothing",
            "nothing",
            lambda: neighbours.at_once(folder, reference, count(4)),
        ),
        "finished": Fault(
            "the command of a finished study again",
            "its runs stay as they are",
            "nothing",
            lambda: neighbours.finished(undisturbed, count(3)),
        ),
        "settings": Fault(
            "another optimizer, batch size, width or shorter run on resuming",
            "refused, with a table of what differs; every file stays as it is",
            "nothing",
            lambda: neighbours.another_config(half, reference, _SETTINGS[: count(4)]),
        ),
        "diverging": Fault(
            "a learning rate with which the run diverges",
            "one line; no checkpoint holds such weights; another rate goes on",
            "nothing",
            lambda: numbers.diverging(folder, reference, _DIVERGING[: count(2)]),
        ),
        "again": Fault(
            "the same seed in other processes, with other hash seeds",
            "the same bits",
            "nothing",
            lambda: numbers.again(folder, reference, count(3)),
        ),
    }  # fmt: skip
    if not disks.mountable(folder):
        del found["full"], found["read_only"]
    return found


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    found, counts = [], {}
    with tempfile.TemporaryDirectory() as folder:
        tried = faults(Path(folder), np.random.default_rng(_SEED.value), _SAMPLE.value)
        names = _ONLY.value or list(tried)
        for fault in (tried[name] for name in names if name in tried):
            outcome = tally(fault.name, fault.happens, fault.lost, fault.trials())
            print(f"{outcome.right} of {outcome.tried}: {outcome.fault}", flush=True)
            for problem in outcome.problems:
                print(f"  {problem}", flush=True)
            found.append(outcome)
    if _CASES.value:
        print(f"readers, {_CASES.value:,} files each", flush=True)
        logging.disable(logging.CRITICAL)  # Orbax and asyncio log each damaged file
        counts = {name: count(_SEED.value, _CASES.value) for name, count in READERS.items()}
    page.record(Path(_OUT.value), found, counts, keep=bool(_ONLY.value) or not _CASES.value)
    if _OUT.value == str(page.RESULTS):
        update_pages.fill()
    wrong = [name for name, counted in counts.items() if counted.silent or counted.crashed]
    wrong += [outcome.fault for outcome in found if outcome.problems]
    if wrong:
        sys.exit(f"error: these did not all end as they should: {'; '.join(wrong)}")


if __name__ == "__main__":
    app.run(main)
