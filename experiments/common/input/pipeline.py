"""Batches of photos through Grain: shuffled, sharded by host, decoded by worker processes.

What a position holds depends only on the seed and the position, not on the number of workers; the
number of hosts only decides who gets which part of a batch. So a run resumes from the number of
batches it has seen.

This module imports no jax, and nothing it runs in a worker touches the accelerator.
"""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from common.input.batch import PADDING, UNREADABLE, HostBatch
from common.input.decode import UnreadableImageError, decode_eval, decode_train
from common.input.sources import Example, Source

Image = dict[str, np.ndarray | np.integer]  # becomes one row of a batch

_READ_THREADS = 2  # per process, so that a slow disk does not stall decoding
_BUFFERED_BATCHES = 2  # finished ones per worker; Grain's default of 500 would be some 20 GB
_WINDOW = 1000  # images, most of which must be readable

_reported: set[str] = set()  # unreadable images this process has reported


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start: int,
    num_workers: int,
    num_classes: int,
    process_index: int,
    process_count: int,
    size: int = 224,
    color_jitter: float = 0.2,
) -> Iterator[HostBatch]:
    """Endless batches of random crops from batch `start` on, one permutation of the data per pass.

    Args:
      source: the labelled image files.
      batch_size: of this host; a step takes `batch_size * process_count` images.
      seed: of order, crops, flips and jitter.
      start: the number of batches already seen; any is as fast as 0.
      num_workers: processes that decode; 0 decodes in this one.
      num_classes: labels must be below it.
      process_index: of this host.
      process_count: hosts.
      size: pixels each way.
      color_jitter: brightness, contrast and saturation factors are drawn uniformly from 1 ± this;
        the device applies them.

    Returns:
      An iterator of "image" uint8 (B, size, size, 3), "label" int32 (B,), negative where
      `UNREADABLE`, and "jitter" float32 (B, 3). The workers end when it ends or is closed.

    Raises:
      ValueError: if the source has other classes or too few images, or, while iterating, if a label
        is out of range.
      RuntimeError: while iterating, if most images cannot be read.
    """
    _check_classes(source, num_classes)
    if len(source) < batch_size * process_count:
        raise ValueError(
            f"{len(source)} images are fewer than a batch of {batch_size * process_count} "
            f"({batch_size} on each of {process_count} hosts): lower --config.batch_size, or check "
            "that the data set is complete"
        )
    load = _LoadTrain(source, num_classes, size, color_jitter)
    dataset = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat().random_map(load)
    dataset = dataset[process_index::process_count].batch(batch_size, drop_remainder=True)[start:]
    return _iterate(dataset, num_workers, batch_size * 3 * size**2)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    num_workers: int,
    num_classes: int,
    process_index: int,
    process_count: int,
    size: int = 224,
    resize: int = 256,
    limit: int | None = None,
) -> Iterator[HostBatch]:
    """The centre crops of all images, once, in order; every host gets as many full batches.

    Args:
      source: the labelled image files.
      batch_size: of this host.
      num_workers: processes that decode; 0 decodes in this one.
      num_classes: labels must be below it.
      process_index: of this host.
      process_count: hosts.
      size: pixels each way.
      resize: pixels of the shorter side before the crop.
      limit: take only this many images, spread evenly over the source.

    Returns:
      An iterator of "image" uint8 (B, size, size, 3) and "label" int32 (B,), negative where
      `PADDING` or `UNREADABLE`.

    Raises:
      ValueError: if the source has other classes or no images, if the crop is too large, or, while
        iterating, if a label is out of range.
      RuntimeError: while iterating, if most images cannot be read.
    """
    _check_classes(source, num_classes)
    if size > resize:
        raise ValueError(f"cannot cut {size} pixels out of {resize}")
    count = min(limit or len(source), len(source))
    if not count:
        raise ValueError("no images to evaluate on")
    batches = -(-count // (batch_size * process_count))
    load = _LoadEval(source, num_classes, size, resize, count)
    dataset = grain.MapDataset.range(batches * batch_size * process_count).map(load)
    dataset = dataset[process_index::process_count].batch(batch_size)
    return _iterate(dataset, min(num_workers, batches), batch_size * 3 * size**2)


def synthetic_batches(
    *,
    batch_size: int,
    num_classes: int,
    seed: int = 0,
    process_index: int = 0,
    size: int = 224,
    color_jitter: float | None = 0.2,
    count: int | None = None,
) -> Iterator[HostBatch]:
    """Repeats one batch of noise, to measure the machine without its disk.

    Args:
      batch_size: of this host.
      num_classes: labels count from 0 and wrap around.
      seed: of the noise.
      process_index: of this host; each gets its own noise.
      size: pixels each way.
      color_jitter: as for `train_batches`; None omits "jitter", as in evaluation.
      count: number of batches; None: endless.

    Returns:
      An iterator of batches like those of `train_batches` or `eval_batches`.
    """
    rng = np.random.default_rng((seed, process_index))
    labels = (np.arange(batch_size) + process_index * batch_size) % num_classes
    batch = {
        "image": rng.integers(0, 256, (batch_size, size, size, 3), np.uint8),
        "label": labels.astype(np.int32),
    }
    if color_jitter is not None:
        factors = rng.uniform(1 - color_jitter, 1 + color_jitter, (batch_size, 3))
        batch["jitter"] = factors.astype(np.float32)
    return itertools.repeat(batch, sys.maxsize if count is None else count)


def prefetch_to_device(
    batches: Iterator[HostBatch], put: Callable[[HostBatch], Any], depth: int = 2
) -> Iterator[Any]:
    """Starts the transfer of batches before they are needed.

    Args:
      batches: on the host; closed together with this iterator.
      put: starts a transfer and returns at once, such as `jax.device_put` with a sharding.
      depth: number of batches in transfer while one is in use.

    Yields:
      What `put` returned, in order.
    """
    underway: collections.deque[Any] = collections.deque()
    try:
        for batch in batches:
            underway.append(put(batch))
            if len(underway) > depth:
                yield underway.popleft()
        yield from underway
    finally:
        if isinstance(batches, Generator):
            batches.close()


@dataclasses.dataclass(frozen=True)
class _LoadTrain:
    """Maps a record's index to a random crop."""

    source: Source
    num_classes: int
    size: int
    color_jitter: float

    def __call__(self, index: int, rng: np.random.Generator) -> Image:
        jitter = rng.uniform(1 - self.color_jitter, 1 + self.color_jitter, 3).astype(np.float32)

        def decode(data: bytes) -> np.ndarray:
            return decode_train(data, rng, self.size)

        image = _load(self.source, index, self.num_classes, self.size, decode)
        return {**image, "jitter": jitter}


@dataclasses.dataclass(frozen=True)
class _LoadEval:
    """Maps a position in the evaluation to a centre crop; positions from `count` on are padding."""

    source: Source
    num_classes: int
    size: int
    resize: int
    count: int

    def __call__(self, position: int) -> Image:
        if position >= self.count:
            return _black(self.size, PADDING)
        index = position * len(self.source) // self.count

        def decode(data: bytes) -> np.ndarray:
            return decode_eval(data, self.resize, self.size)

        return _load(self.source, index, self.num_classes, self.size, decode)


def _load(
    source: Source, index: int, num_classes: int, size: int, decode: Callable[[bytes], np.ndarray]
) -> Image:
    """Reads and decodes a record; reports an unreadable one and makes it black."""
    example = Example(b"", 0, f"record {index}")
    try:
        example = source[index]
        if not 0 <= example.label < num_classes:  # not a bad file, but the wrong data set
            raise ValueError(
                f"{example.name} has label {example.label}, which is not in [0, {num_classes})"
            )
        return {"image": decode(example.image), "label": np.int32(example.label)}
    except (UnreadableImageError, OSError) as error:
        if example.name not in _reported:
            _reported.add(example.name)
            message = f"unreadable image, left out: {example.name}: {error}"
            print(message, file=sys.stderr, flush=True)
        return _black(size, UNREADABLE)


def _black(size: int, label: int) -> Image:
    return {"image": np.zeros((size, size, 3), np.uint8), "label": np.int32(label)}


def _check_classes(source: Source, num_classes: int) -> None:
    if source.num_classes != num_classes:
        raise ValueError(
            f"the data have {source.num_classes} classes, not the {num_classes} expected: is it "
            "the right data set?"
        )


def _iterate(dataset: grain.MapDataset, num_workers: int, batch_bytes: int) -> Iterator[HostBatch]:
    """Iterates over the batches; workers make them in turn, and end with the iterator."""
    _check_shared_memory(2 * _BUFFERED_BATCHES * num_workers * batch_bytes)
    batches = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=_READ_THREADS, prefetch_buffer_size=_BUFFERED_BATCHES)
    )
    if num_workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags, which only absl.app parses
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(
            num_workers, per_worker_buffer_size=_BUFFERED_BATCHES
        )
        batches = batches.mp_prefetch(options, _start_worker)

    def run() -> Iterator[HostBatch]:
        iterator = iter(batches)
        seen = unreadable = 0
        try:
            for batch in iterator:
                # Copied, so that memory shared with a worker is released now, not once the device
                # is done with it.
                batch = {name: np.array(values) for name, values in batch.items()}
                seen += len(batch["label"])
                unreadable += int((batch["label"] == UNREADABLE).sum())
                if seen >= _WINDOW:
                    # One bad file must not end a run of days, but a lost disk must.
                    if 2 * unreadable > seen:
                        raise RuntimeError(
                            f"{unreadable} of the last {seen} images are unreadable: is the data "
                            "set still there?"
                        )
                    seen = unreadable = 0
                yield batch
        finally:
            iterator.close()

    return run()


def _check_shared_memory(needed: int) -> None:
    """Workers pass batches in shared memory, and die of a bus error if it is full."""
    folder = "/dev/shm"
    if not needed or not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RuntimeError(
            f"the workers need {needed / 1e6:.0f} MB in {folder}, which has {free / 1e6:.0f}: "
            "start the container with more (docker run --shm-size=...), or lower --config.workers"
        )


def _start_worker(index: int, count: int) -> None:
    """Ties a worker's lifetime to its parent, however that dies; leaves signals to the parent."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
