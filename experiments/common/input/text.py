"""Text as bytes: windows of tokens, and for each token the one that follows it as its label.

The text is split by position: the first 90% train, the next 5% validate, the last 5% test.
"""

import itertools
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from common.config import ConfigError
from common.input.batch import Batch, HostBatch, Loader, eval_batch_size
from common.input.in_memory import padded_batches, spread

BYTES = 256  # the vocabulary
_SUFFIXES = (".txt", ".py")
_SHARES = (0.90, 0.95)  # where validation and test begin


class Text(NamedTuple):
    """Three parts of a text, one after another; uint8."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def load_text(path: str = "") -> Text:
    """Reads a text and splits it.

    Args:
      path: of a file, or of a folder, whose .txt and .py files are joined in the order of their
        names; empty: Python's standard library, of which every version has another.

    Raises:
      FileNotFoundError: if there is no such file, or the folder has none.
    """
    found = Path(path or sysconfig.get_path("stdlib"))
    inside = sorted(file for file in found.glob("*") if file.suffix in _SUFFIXES)
    files = [found] if found.is_file() else inside
    if not files:
        raise FileNotFoundError(
            f"no text in --config.text={found}: give a file, or a folder of "
            f"{' or '.join(_SUFFIXES)} files"
        )
    text = np.frombuffer(b"".join(file.read_bytes() for file in files), np.uint8)
    return Text(*np.split(text, [int(share * len(text)) for share in _SHARES]))


def text_loader(config: ml_collections.ConfigDict) -> Loader:
    """Makes the `Loader` of `config.text`; its images are windows of `config.context` tokens.

    A step's training windows begin anywhere in their part, and depend on `config.seed` and the step
    alone. Evaluation sees windows that do not overlap, `config.eval_windows` of those that lie side
    by side, or all. Hosts share out each batch.

    Raises:
      FileNotFoundError: if there is no text.
      ConfigError: if a part is shorter than a window, or the network has no room for all bytes.
    """
    text, length = load_text(config.text), config.context
    if config.num_classes < BYTES:
        raise ConfigError(f"--config.num_classes={config.num_classes}: text has {BYTES} bytes")
    for name, part in text._asdict().items():
        if len(part) <= length:
            raise ConfigError(
                f"the {name} part of --config.text has {len(part)} bytes, and a window needs "
                f"{length + 1}: give a longer text, or lower --config.context"
            )
    host, hosts = jax.process_index(), jax.process_count()

    def train(start: int) -> Iterator[HostBatch]:
        for step in itertools.count(start):
            rng = np.random.default_rng((config.seed, step))
            starts = rng.integers(len(text.train) - length, size=config.batch_size)
            yield windows(text.train, starts[host::hosts], length)

    def evaluate(part: np.ndarray, most: int) -> Callable[[int | None], Iterator[HostBatch]]:
        every = length * spread(count_windows(part, length), most)

        def batches(limit: int | None) -> Iterator[HostBatch]:
            cut = windows(part, every[spread(len(every), limit)], length)
            for batch in padded_batches(cut["image"], cut["label"], eval_batch_size(config)):
                yield {name: array[host::hosts] for name, array in batch.items()}

        return batches

    return Loader(
        count_windows(text.train, length),
        len(spread(count_windows(text.validation, length), config.eval_windows)),
        train,
        evaluate(text.validation, config.eval_windows),
        _tokens,
        _tokens,
        evaluate(text.test, 0),
    )


def count_windows(part: np.ndarray, length: int) -> int:
    """Returns how many windows lie side by side in a part, each token's successor included."""
    return (len(part) - 1) // length


def windows(part: np.ndarray, starts: np.ndarray, length: int) -> HostBatch:
    """Returns the windows that begin at `starts`, as tokens and labels of shape (n, length)."""
    cut = part[starts[:, np.newaxis] + np.arange(length + 1)].astype(np.int32)
    return {"image": cut[:, :-1], "label": cut[:, 1:]}


def _tokens(batch: Batch, key: jax.Array) -> jax.Array:
    """The tokens as they are."""
    del key
    return batch["image"]
