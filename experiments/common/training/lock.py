"""A lock on a workdir: two runs in one would mix their files."""

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from common.config import ConfigError

_UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_NO_LOCKS = "the file system of {} has no locks: see to it that no other run uses this workdir"
FILE, HOLDER = "run.lock", "run.lock.json"


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a workdir, which is made if necessary.

    The operating system gives it up with the process, however that ends, so that no lock is ever
    stale; where a file system has no locks, a warning says so. Of several hosts the first takes it,
    and all learn whether it could.

    Raises:
      ConfigError: if another run holds it; the error says which. Nothing is touched.
      OSError: if the file cannot be written.
    """
    lock = filelock.FileLock(workdir / FILE, fallback_to_soft=False)
    refused, failure = "", None
    if jax.process_index() == 0:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
            with contextlib.suppress(OSError):  # a note, no more
                (workdir / HOLDER).write_text(json.dumps(_me()) + "\n")
        except filelock.Timeout:
            refused = _holder(workdir)
        except NotImplementedError:
            warnings.warn(_NO_LOCKS.format(workdir), stacklevel=3)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                warnings.warn(_NO_LOCKS.format(workdir), stacklevel=3)
            else:
                failure = error
    if jax.process_count() > 1:
        free = multihost_utils.broadcast_one_to_all(np.array(not refused and failure is None))
        if not free and jax.process_index() > 0:
            refused = "another run, as the first host says"
    if failure is not None:
        raise failure
    if refused:
        raise ConfigError(
            f"{workdir} is in use by {refused}: wait for it, stop it, or give another --workdir"
        )
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):
                (workdir / HOLDER).unlink(missing_ok=True)
            lock.release()


def _me() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _holder(workdir: Path) -> str:
    """Says who holds the lock, as far as its note tells."""
    try:
        note = json.loads((workdir / HOLDER).read_text())
        return f"process {note['process']} on {note['host']}, since {note['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
