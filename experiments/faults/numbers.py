"""Numbers that are not finite, and the same numbers again."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.training.checkpoints import newest_step

from faults import subject

_RUN = subject.RUNS[-1]


def diverging(
    folder: Path, reference: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Runs with settings that diverge, which must stop in one line; then with the usual ones.

    Args:
      folder: for the runs.
      reference: the result of the usual settings.
      changes: of the config, one run each.

    Yields:
      For each run RIGHT, or what went wrong.
    """
    for index, change in enumerate(changes):
        workdir = folder / f"diverging_{index}"
        ended = subject.finish(workdir, **change)
        if not ended.in_one_line or "not finite" not in ended.printed:
            yield f"{change}: status {ended.status}: {ended.printed[-300:]}"
        elif newest_step(workdir / _RUN / "checkpoints") is not None:
            yield f"{change}: a checkpoint of step {newest_step(workdir / _RUN / 'checkpoints')}"
        else:
            yield subject.resumed_problem(workdir, reference)


def again(folder: Path, reference: Mapping[str, Any], trials: int) -> Iterator[str]:
    """Runs the same command in other processes, with other hash seeds."""
    for index in range(trials):
        workdir = folder / f"again_{index}"
        ended = subject.finish(workdir, hash_seed=index + 1)
        yield f"status {ended.status}" if ended.status else subject.difference(workdir, reference)
