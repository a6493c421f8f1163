"""Readers against files that were damaged or made up: how often they read right, refuse or fail.

Each case starts from a valid file, changes its bytes or its structure, check sums renewed in part,
and reads it. Where a format has a check sum that was not renewed, what is read must equal what was
saved; elsewhere it must be well-formed.
"""

import contextlib
import importlib.util
import resource
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from common.config import ConfigError
from common.input.decode import UnreadableImageError

import cbp_jax
from faults import reader_cases
from faults.mutations import Rng

_SECONDS = 10.0  # of CPU time that one case may take
_MEMORY = 4 << 30  # bytes that all cases may take beside what the process has


class Counts(NamedTuple):
    """How many cases of a reader ended how."""

    cases: int
    intact: int  # returned what was saved, or what the changed file says
    refused: int  # a documented error
    silent: int  # returned something else
    crashed: int  # another error, or too much time


class Reader(NamedTuple):
    """A reader, and how to try it."""

    prepare: Callable[[Rng, Path], reader_cases.Read]  # one of `faults.reader_cases`
    documented: tuple[type[Exception], ...]


_READERS: Mapping[str, Reader] = MappingProxyType(
    {
        "packed files": Reader(reader_cases.packed_case, (cbp_jax.PackedError,)),
        ".safetensors weights": Reader(reader_cases.safetensors_case, (ValueError,)),
        ".pth weights": Reader(reader_cases.pickle_case, (ValueError,)),
        "photos": Reader(reader_cases.photo_case, (UnreadableImageError,)),
        "config.json": Reader(reader_cases.config_case, (ConfigError, FileNotFoundError)),
        "summary.json": Reader(reader_cases.summary_case, (ValueError,)),
        "metrics.jsonl": Reader(reader_cases.metrics_case, ()),
        "checkpoints": Reader(reader_cases.checkpoint_case, (ValueError,)),
    }
)
NAMES = tuple(
    name for name in _READERS if name != ".pth weights" or importlib.util.find_spec("torch")
)


def attempt(name: str, seed: int, case: int = 0) -> tuple[str, Exception | None]:
    """Tries a reader once; returns a field of `Counts`, and the error that was raised, if any."""
    reader, rng = _READERS[name], np.random.default_rng((seed, case))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = reader.prepare(rng, Path(folder))
        started = time.process_time()
        try:
            right = read()
        except reader.documented as error:
            found: tuple[str, Exception | None] = "refused", error
        except Exception as error:
            return "crashed", error
        else:
            found = "intact" if right else "silent", None
        if (seconds := time.process_time() - started) > _SECONDS:
            return "crashed", TimeoutError(f"{seconds:.1f} s of CPU time")
    return found


def count(name: str, seed: int, cases: int) -> Counts:
    """Tries a reader on so many files, which depend on the seed, in bounded memory."""
    with bounded_memory():
        found = [attempt(name, seed, case)[0] for case in range(cases)]
    return Counts(cases, *(found.count(field) for field in Counts._fields[1:]))


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Lets allocations fail that would take the process too far beyond what it has."""
    usual = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + _MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, usual[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)


READERS: Mapping[str, Callable[[int, int], Counts]] = MappingProxyType(
    {name: partial(count, name) for name in NAMES}
)
