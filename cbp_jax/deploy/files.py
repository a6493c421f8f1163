"""Writing files so that they are there whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a new file to, which takes the place of `path` when all went well.

    Args:
      path: of the file to write; an error in the block, or a crash, leaves what is there as it is.

    Yields:
      The path of an empty file in the same file system.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        new = Path(folder) / path.name
        new.touch()
        mode = new.stat().st_mode
        yield new
        new.chmod(mode)  # of any new file: safetensors lets nobody else read its own
        _sync(new)  # the data first: else a crash could leave the new name with nothing behind it
        new.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
