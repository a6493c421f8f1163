"""Data sets that fit into memory."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from common.input import in_memory


def test_shuffled_batches_see_every_image_once_a_pass():
    batches = list(itertools.islice(in_memory.shuffled_batches(10, 4, seed=0), 10))
    passes = np.concatenate(batches).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(order) for order in passes}) == 4
    again = list(itertools.islice(in_memory.shuffled_batches(10, 4, seed=0), 10))
    np.testing.assert_array_equal(batches, again)


def test_missing_data_set_says_how_to_prepare_it(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason='needs the extra: pip install -e ".[test]"')
    with pytest.raises(
        FileNotFoundError, match=r"fashion_mnist(.|\n)*download_and_prepare(.|\n)*TFDS_DATA_DIR"
    ):
        in_memory.load_tfds("fashion_mnist", str(tmp_path))


@pytest.mark.skipif(
    not (Path(os.environ.get("TFDS_DATA_DIR", "")) / "fashion_mnist").is_dir()
    or "TFDS_DATA_DIR" not in os.environ,
    reason="needs Fashion-MNIST as ArrayRecord in TFDS_DATA_DIR",
)
def test_fashion_mnist_is_read_whole():
    dataset = in_memory.load_tfds("fashion_mnist", None)
    assert (dataset.train_images.shape, dataset.test_images.shape) == (
        (60000, 28, 28, 1),
        (10000, 28, 28, 1),
    )
    assert dataset.train_images.dtype == np.float32
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), np.full(10, 6000))
