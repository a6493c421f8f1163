"""Atomic replacement of files."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields the path of a new, empty file that atomically replaces `path` on success.

    After an error in the block, or a crash, `path` is unchanged.

    Args:
      path: the file to write; the new file is in the same file system.

    Raises:
      FileNotFoundError: if the folder does not exist.
      OSError: if `path` is a folder, or no regular file.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder: make it first", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder: give the path of a file", str(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file, and is not replaced", str(path))
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        new.touch()
        mode = new.stat().st_mode
        yield new
        new.chmod(mode)  # the usual mode: safetensors lets nobody else read its files
        _sync(new)  # the data before the name, or a crash could leave an empty file
        new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
