"""Data sets that fit into memory, and the order in which training sees them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Images in [0, 1], NHWC, float32; labels int32."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def load_digits(test_share: float = 0.5) -> Dataset:
    """scikit-learn's 1,797 handwritten 8x8 digits, which need no download; the split is always the same."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = (digits.images / 16)[..., np.newaxis].astype(np.float32)
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images, digits.target.astype(np.int32), test_size=test_share, random_state=0, stratify=digits.target
    )
    return Dataset(train_images, train_labels, test_images, test_labels)


def load_tfds(name: str, data_dir: str | None) -> Dataset:
    """A small image data set of TFDS, prepared as ArrayRecord, decoded into memory by Grain.

    Args:
      name: of the TFDS builder, with features `image` and `label` and splits `train` and `test`.
      data_dir: the TFDS folder; None is `TFDS_DATA_DIR`, or TFDS's own default.

    Raises:
      FileNotFoundError: if the data set is not there as ArrayRecord; it says how to prepare it.
    """
    train_images, train_labels = _load_split(name, "train", data_dir)
    test_images, test_labels = _load_split(name, "test", data_dir)
    return Dataset(train_images, train_labels, test_images, test_labels)


def _load_split(name: str, split: str, data_dir: str | None) -> tuple[np.ndarray, np.ndarray]:
    import grain
    import tensorflow_datasets as tfds

    try:
        source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    except (KeyError, NotImplementedError, FileNotFoundError, AssertionError, tfds.core.DatasetNotFoundError) as error:
        where = data_dir or tfds.core.constants.DATA_DIR
        raise FileNotFoundError(
            f"no {name!r} as ArrayRecord in {where}. Prepare it once, with network (only this needs TensorFlow):\n"
            f'  pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{where}', file_format='array_record').download_and_prepare()\"\n"
            "and give its folder by --config.data_dir=DIR or the environment variable TFDS_DATA_DIR."
        ) from error
    batches = (
        grain.MapDataset.source(source)
        .map(lambda example: (example["image"], example["label"]))
        .batch(1000)
        .to_iter_dataset(grain.ReadOptions(num_threads=2))
    )
    images, labels = zip(*batches, strict=True)
    return np.concatenate(images).astype(np.float32) / 255, np.concatenate(labels).astype(np.int32)


def shuffled_batches(size: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless index batches: one permutation of the data after another, cut into full batches."""
    rng = np.random.default_rng(seed)
    pending = np.empty(0, np.int64)
    while True:
        while len(pending) < batch_size:
            pending = np.concatenate([pending, rng.permutation(size)])
        batch, pending = pending[:batch_size], pending[batch_size:]
        yield batch
