"""Room on the disk: looked for before a run and each checkpoint, and missed in one line."""

import contextlib
import errno
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from common.config import ConfigError
from common.training.checkpoints import newest_step

PyTree = Any
_WORDS_OF = {2: "two", 3: "three"}
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
# TensorStore, which writes checkpoints, says so in words alone.
_WORDS = ("No space left on device", "Disk quota exceeded", "Read-only file system")


class DiskError(ConfigError):
    """A file cannot be written: the disk is full, or the folder read-only."""


def check_space(folder: Path, state: PyTree, checkpoints: int = 2) -> None:
    """Checks that a disk has room for checkpoints of a state.

    Args:
      folder: where they go.
      state: of the run.
      checkpoints: how many: Orbax writes one before it removes the oldest; the best is a third.

    Raises:
      DiskError: if it has not.
    """
    needed = checkpoints * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = _free(folder)
    enough = free >= needed
    if jax.process_count() > 1:  # one host decides, or others would wait for it
        enough = bool(multihost_utils.broadcast_one_to_all(np.array(enough)))
    if not enough:
        raise DiskError(
            f"{_WORDS_OF[checkpoints]} checkpoints need {needed / 1e6:,.1f} MB, and "
            f"{free / 1e6:,.1f} MB are free where {folder} is"
        )


@contextlib.contextmanager
def explained(workdir: Path, kept: str = "") -> Iterator[None]:
    """Turns the errors of a full disk, or of a read-only folder, into one line.

    Args:
      workdir: of the run, or of a study.
      kept: what is not lost, and what to do; empty: the newest checkpoint.

    Raises:
      DiskError: instead of such an error.
    """
    try:
        yield
    except Exception as error:
        reason = _reason(error, workdir)
        if not reason:
            raise
        raise DiskError(
            f"{reason}. {_free(workdir) / 1e6:,.1f} MB are free: make room, or give another "
            f"--workdir; {kept or _kept(workdir)}"
        ) from error


def _kept(workdir: Path) -> str:
    step = None
    with contextlib.suppress(OSError):
        step = newest_step(workdir / "checkpoints")
    if step is None:
        return "there is no checkpoint yet"
    return f"the checkpoint of step {step:,} is intact, and the same command resumes there"


def _reason(error: BaseException | None, workdir: Path) -> str:
    """What a full disk, or a read-only workdir, has to do with an error; empty: nothing."""
    while error is not None:
        if isinstance(error, DiskError):
            return str(error)
        if isinstance(error, OSError) and error.errno is not None:
            file = Path(str(error.filename)) if error.filename else None
            full = error.errno in _FULL and (file is None or _related(file, workdir))
            if full or (file and error.errno in _READ_ONLY and _related(file, workdir)):
                return f"cannot write {file or 'a file'}: {error.strerror}"
        elif found := next((words for words in _WORDS if words in str(error)), None):
            # `shutil.copytree` collects errors in one without a number.
            what = "a file" if isinstance(error, OSError) else "a checkpoint"
            return f"cannot write {what}: {found}"
        error = error.__cause__ or error.__context__
    return ""


def _related(file: Path, workdir: Path) -> bool:
    """Whether a file is in the workdir, or is it or a folder that would hold it."""
    file, workdir = file.absolute(), workdir.absolute()
    return workdir in (file, *file.parents) or file in workdir.parents


def _free(folder: Path) -> float:
    """The bytes that are free where a folder is, or will be; infinite if nobody says."""
    for place in (folder, *folder.absolute().parents):
        with contextlib.suppress(OSError):
            usage = shutil.disk_usage(place)
            return usage.free if usage.total else math.inf
    return math.inf
