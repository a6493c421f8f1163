"""A disk that fills up while a run writes to it, or that may not be written."""

import contextlib
import functools
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from faults import subject
from faults.outcome import RIGHT

_MEGABYTES = 64


def mountable(folder: Path) -> bool:
    """Whether this process may mount a small disk."""
    try:
        with small_disk(folder / "probe"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A disk in memory, mounted at a path."""
    path.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={_MEGABYTES}m", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def full(
    folder: Path,
    reference: Mapping[str, Any],
    rng: np.random.Generator,
    seconds: float,
    trials: int,
) -> Iterator[str]:
    """Fills a disk at a random moment of a run, empties it, and resumes.

    Args:
      folder: for the disks.
      reference: the result without faults.
      rng: decides when, and how many bytes stay free: up to 50,000, a tenth of a checkpoint.
      seconds: of a run.
      trials: how many; runs that end before the moment do not count.

    Yields:
      For each trial RIGHT, or what went wrong.
    """
    tried = done = 0
    while done < trials:
        tried += 1
        with small_disk(folder / f"full_{tried}") as disk:
            workdir, until = disk / "study", time.monotonic() + rng.uniform(0.2, 0.9) * seconds
            process = subject.start(workdir)
            if not subject.wait_for(process, functools.partial(_passed, until)):
                subject.end(process)
                seconds *= 0.8  # it has become faster since it was timed
                continue
            _fill(disk / "ballast", int(rng.integers(50_000)))
            ended = subject.end(process)
            (disk / "ballast").unlink()
            # One that needed no more room has ended well.
            problem = RIGHT if ended.status == 0 else _not_explained(ended)
            yield problem or subject.resumed_problem(workdir, reference)
            done += 1


def read_only(
    template: Path, folder: Path, reference: Mapping[str, Any], trials: int
) -> Iterator[str]:
    """Resumes copies of an interrupted study on a disk that may not be written; then where it may.

    A disk with open files, as a run has, cannot be made read-only at once.
    """
    for index in range(trials):
        with small_disk(folder / f"read_only_{index}") as disk:
            workdir = disk / "study"
            shutil.copytree(template, workdir)
            _mount("-o", "remount,ro", str(disk))
            ended = subject.finish(workdir)
            _mount("-o", "remount,rw", str(disk))
            yield _not_explained(ended) or subject.resumed_problem(workdir, reference)


def _fill(ballast: Path, free: int) -> None:
    with ballast.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):  # No space left on device
            for _ in range(16 * _MEGABYTES):
                file.write(bytes(2**16))
        file.truncate(max(file.tell() - free, 0))


def _passed(moment: float) -> bool:
    return time.monotonic() > moment


def _not_explained(ended: subject.Ended) -> str:
    if ended.in_one_line and "are free" in ended.printed:
        return RIGHT
    return f"status {ended.status}: {ended.printed[-600:]}"


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
