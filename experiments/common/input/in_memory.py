"""Data sets that fit into memory, and the order in which training sees them."""

import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

PADDING = -1  # the label of what fills up the last batch of an evaluation
UNREADABLE = -2  # the label of an image that could not be read or decoded; it is black


class Dataset(NamedTuple):
    """Images NHWC, float32 in [0, 1] or uint8; labels int32."""

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
        images,
        digits.target.astype(np.int32),
        test_size=test_share,
        random_state=0,
        stratify=digits.target,
    )
    return Dataset(train_images, train_labels, test_images, test_labels)


def load_tfds(name: str, data_dir: str | None, dtype: type = np.float32) -> Dataset:
    """A small image data set of TFDS, prepared as ArrayRecord, decoded into memory by Grain.

    Args:
      name: of the TFDS builder, with features `image` and `label` and splits `train` and `test`.
      data_dir: the TFDS folder; None is `TFDS_DATA_DIR`, or TFDS's own default.
      dtype: of the images: float32, in [0, 1], or uint8.

    Raises:
      FileNotFoundError: if the data set is not there as ArrayRecord; it says how to prepare it.
    """
    train_images, train_labels = _load_split(name, "train", data_dir, dtype)
    test_images, test_labels = _load_split(name, "test", data_dir, dtype)
    return Dataset(train_images, train_labels, test_images, test_labels)


def open_tfds(name: str, split: str, data_dir: str | None, **options: Any) -> Any:
    """`tfds.data_source` of a data set prepared as ArrayRecord; nothing is downloaded.

    Args:
      name: of the TFDS builder.
      split: one of its splits.
      data_dir: the TFDS folder; None is `TFDS_DATA_DIR`, or TFDS's own default.
      **options: passed on to `tfds.data_source`.

    Raises:
      FileNotFoundError: if the data set is not there as ArrayRecord; it says how to prepare it.
    """
    import tensorflow_datasets as tfds

    try:
        return tfds.data_source(name, split=split, data_dir=data_dir, download=False, **options)
    except (
        KeyError,
        NotImplementedError,
        FileNotFoundError,
        AssertionError,
        tfds.core.DatasetNotFoundError,
    ) as error:
        where = data_dir or tfds.core.constants.DATA_DIR
        download = otherwise = ""
        if name == "imagenet2012":
            manual = os.path.join(where, "downloads", "manual")  # where TFDS looks
            download = (
                "TFDS cannot download it: register at https://image-net.org, and put ILSVRC2012_img_train.tar and "
                f"ILSVRC2012_img_val.tar into {manual}. "
            )
            otherwise = (
                "\nOr unpack the photos to DIR/train/<class>/*.JPEG and DIR/val/<class>/*.JPEG, and give --config.data=folder "
                "--config.data_dir=DIR."
            )
        raise FileNotFoundError(
            f"no {name!r} as ArrayRecord in {where}. {download}Prepare it once, with network (only this needs TensorFlow):\n"
            f'  pip install tensorflow && python -c "import tensorflow_datasets as tfds; '
            f"tfds.builder('{name}', data_dir='{where}', file_format='array_record').download_and_prepare()\"\n"
            f"and give its folder by --config.data_dir=DIR or the environment variable TFDS_DATA_DIR.{otherwise}"
        ) from error


def _load_split(
    name: str, split: str, data_dir: str | None, dtype: type
) -> tuple[np.ndarray, np.ndarray]:
    import grain

    source = open_tfds(name, split, data_dir)
    batches = (
        grain.MapDataset.source(source)
        .map(lambda example: (example["image"], example["label"]))
        .batch(1000)
        .to_iter_dataset(grain.ReadOptions(num_threads=2))
    )
    images, labels = zip(*batches, strict=True)
    whole = np.concatenate(images)
    return whole if dtype is np.uint8 else whole.astype(np.float32) / 255, np.concatenate(
        labels
    ).astype(np.int32)


def shuffled_batches(size: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Endless index batches: one permutation of the data after another, cut into full batches."""
    rng = np.random.default_rng(seed)
    pending = np.empty(0, np.int64)
    while True:
        while len(pending) < batch_size:
            pending = np.concatenate([pending, rng.permutation(size)])
        batch, pending = pending[:batch_size], pending[batch_size:]
        yield batch


def padded_batches(
    images: np.ndarray, labels: np.ndarray, batch_size: int = 1000
) -> Iterator[dict[str, np.ndarray]]:
    """Once through the data; the last batch is filled up with empty images of label `PADDING`, so that one shape is compiled."""
    for start in range(0, len(labels), batch_size):
        batch, target = images[start : start + batch_size], labels[start : start + batch_size]
        short = batch_size - len(target)
        yield {
            "image": np.concatenate([batch, np.zeros((short, *batch.shape[1:]), batch.dtype)]),
            "label": np.concatenate([target, np.full(short, PADDING, target.dtype)]),
        }
