"""Commands that meet a run of others in their workdir, or one that has finished."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from faults import subject
from faults.outcome import RIGHT

_RUN = subject.RUNS[-1]


def at_once(folder: Path, reference: Mapping[str, Any], trials: int) -> Iterator[str]:
    """Starts the same command twice; one must refuse, and the other end as if alone."""
    for index in range(trials):
        workdir = folder / f"pair_{index}"
        pair = [subject.start(workdir) for _ in range(2)]
        ended = sorted((subject.end(process) for process in pair), key=lambda one: one.status)
        if [one.status for one in ended] != [0, 1]:
            yield f"statuses {[one.status for one in ended]}: {ended[-1].printed[-300:]}"
        elif not ended[1].in_one_line or "in use by" not in ended[1].printed:
            yield f"no refusal in one line: {ended[1].printed[-300:]}"
        else:
            yield subject.difference(workdir, reference)


def finished(workdir: Path, trials: int) -> Iterator[str]:
    """Runs the command of a finished study again, which must leave its runs as they are."""
    for _ in range(trials):
        before = {name: _files(workdir / name) for name in subject.RUNS}
        ended = subject.finish(workdir)
        if ended.status:
            yield f"status {ended.status}: {ended.printed[-300:]}"
        else:
            yield ", ".join(run for run in before if _files(workdir / run) != before[run])


def another_config(
    template: Path, reference: Mapping[str, Any], changes: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Resumes an interrupted study with other settings, which must be refused; then as it was."""
    before = _files(template / _RUN)
    for change in changes:
        ended = subject.finish(template, **change)
        if not ended.in_one_line:
            yield f"{change}: status {ended.status}: {ended.printed[-300:]}"
        elif _files(template / _RUN) != before:
            yield f"{change}: files changed"
        else:
            yield RIGHT
    yield subject.resumed_problem(template, reference)


def _files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of each file; those of the lock come and go."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith("run.lock")
    }
