"""Data sets that fit into memory, and the order in which training sees them."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import ml_collections
import numpy as np

from common.config import ConfigError
from common.input.batch import PADDING, HostBatch, Loader, Preprocess, eval_batch_size
from common.input.sources import open_tfds


class Dataset(NamedTuple):
    """Images NHWC, float32 in [0, 1] or uint8; labels int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(test_share: float = 0.5) -> Dataset:
    """scikit-learn's 1,797 handwritten 8x8 digits, which it ships with; always the same split."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = (digits.images / 16)[..., np.newaxis].astype(np.float32)
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images,
        digits.target.astype(np.int32),
        test_size=test_share,
        random_state=0,
        stratify=digits.target,
    )
    return Dataset(train_images, train_labels, test_images, test_labels)


def load_tfds(name: str, data_dir: str | None, dtype: type = np.float32) -> Dataset:
    """Decodes a small TFDS image data set, prepared as ArrayRecord, into memory.

    Args:
      name: of the TFDS builder, with features `image` and `label` and splits `train` and `test`.
      data_dir: the TFDS folder; None: `TFDS_DATA_DIR`, or TFDS's default.
      dtype: of the images: float32, in [0, 1], or uint8.

    Raises:
      FileNotFoundError: if the data set is not there as ArrayRecord; it says how to prepare it.
    """
    train_images, train_labels = _load_split(name, "train", data_dir, dtype)
    test_images, test_labels = _load_split(name, "test", data_dir, dtype)
    return Dataset(train_images, train_labels, test_images, test_labels)


def _load_split(
    name: str, split: str, data_dir: str | None, dtype: type
) -> tuple[np.ndarray, np.ndarray]:
    import grain

    batches = (
        grain.MapDataset.source(open_tfds(name, split, data_dir))
        .map(lambda example: (example["image"], example["label"]))
        .batch(1000)
        .to_iter_dataset(grain.ReadOptions(num_threads=2))
    )
    parts = zip(*batches, strict=True)
    images, labels = (np.concatenate(part) for part in parts)
    if dtype is not np.uint8:
        images = images.astype(np.float32) / 255
    return images, labels.astype(np.int32)


def in_memory_loader(
    dataset: Dataset,
    config: ml_collections.ConfigDict,
    train_preprocess: Preprocess,
    eval_preprocess: Preprocess,
) -> Loader:
    """Makes a data set's `Loader`: `config.seed` orders training; hosts share out each batch.

    Warns:
      UserWarning: if there are classes without images to train on.

    Raises:
      ConfigError: if `config.validation_images` leaves no image to train on, or a label is negative
        or not below `config.num_classes`.
    """
    every = np.concatenate([dataset.train_labels, dataset.test_labels])
    lowest, highest = int(every.min()), int(every.max())
    if lowest < 0:
        raise ConfigError(f"the labels of {config.data} begin at {lowest}: give labels from 0")
    if highest >= config.num_classes:
        raise ConfigError(
            f"--config.num_classes={config.num_classes}, but the labels of {config.data} go up to "
            f"{highest}"
        )
    host, hosts = jax.process_index(), jax.process_count()

    def evaluation(
        images: np.ndarray, labels: np.ndarray
    ) -> Callable[[int | None], Iterator[HostBatch]]:
        def evaluate(limit: int | None) -> Iterator[HostBatch]:
            some = images, labels
            if limit and limit < len(labels):
                index = spread(len(labels), limit)
                some = images[index], labels[index]
            for batch in padded_batches(*some, eval_batch_size(config)):
                yield {name: array[host::hosts] for name, array in batch.items()}

        return evaluate

    images, labels = dataset.train_images, dataset.train_labels
    evaluate, test = evaluation(dataset.test_images, dataset.test_labels), None
    eval_images = len(dataset.test_labels)
    if config.validation_images:
        kept, held = hold_out(labels, config.validation_images)
        evaluate, test = evaluation(images[held], labels[held]), evaluate
        images, labels, eval_images = images[kept], labels[kept], len(held)
    if absent := sorted(set(range(config.num_classes)) - set(labels.tolist())):
        warnings.warn(
            f"no images to train on of {len(absent)} classes of {config.data}, such as "
            f"{absent[0]}: is --config.num_classes={config.num_classes} right?",
            stacklevel=2,
        )

    def train(start: int) -> Iterator[HostBatch]:
        order = shuffled_batches(len(labels), config.batch_size, config.seed)
        for index in itertools.islice(order, start, None):
            mine = index[host::hosts]
            yield {"image": images[mine], "label": labels[mine]}

    preprocess = train_preprocess, eval_preprocess
    return Loader(len(labels), eval_images, train, evaluate, *preprocess, test)


def hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Divides a training set; the same way for all runs, so that they compare.

    The images are shuffled within each class, and evenly spread ones are held out: of each class,
    its share of `count` to within one image.

    Args:
      labels: of the training images.
      count: images to hold out.

    Returns:
      Indices of the images to train on and of those held out, both increasing.

    Raises:
      ConfigError: if no image would be left to train on.
    """
    size = len(labels)
    if count >= size:
        raise ConfigError(
            f"--config.validation_images={count} leaves none of the {size} training images: give "
            "fewer"
        )
    order = np.random.default_rng(0).permutation(size)
    by_class = order[np.argsort(labels[order], kind="stable")]
    held = np.sort(by_class[spread(size, count)])
    return np.setdiff1d(np.arange(size), held), held


def shuffled_batches(size: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless full batches of indices, cut from one permutation of the data after another."""
    rng = np.random.default_rng(seed)
    pending = np.empty(0, np.int64)
    while True:
        while len(pending) < batch_size:
            pending = np.concatenate([pending, rng.permutation(size)])
        batch, pending = pending[:batch_size], pending[batch_size:]
        yield batch


def spread(count: int, limit: int | None) -> np.ndarray:
    """Returns the indices of `limit` of so many entries, spread evenly; all, if it is None or 0."""
    limit = min(limit or count, count)
    return np.arange(limit) * count // limit


def padded_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int = 1000
) -> Iterator[HostBatch]:
    """One pass over the data; zeros labelled `PADDING` fill the last batch, to keep one shape."""
    for start in range(0, len(labels), batch_size):
        batch, target = images[start : start + batch_size], labels[start : start + batch_size]
        short = batch_size - len(target)
        yield {
            "image": np.concatenate([batch, np.zeros((short, *batch.shape[1:]), batch.dtype)]),
            "label": np.concatenate(
                [target, np.full((short, *target.shape[1:]), PADDING, target.dtype)]
            ),
        }
