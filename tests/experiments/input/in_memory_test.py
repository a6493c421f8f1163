"""Data sets that fit into memory."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from common.config import ConfigError
from common.input import in_memory


def test_shuffled_batches_see_every_image_once_a_pass():
    batches = list(itertools.islice(in_memory.shuffled_batches(10, 4, seed=0), 10))
    passes = np.concatenate(batches).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(order) for order in passes}) == 4
    again = list(itertools.islice(in_memory.shuffled_batches(10, 4, seed=0), 10))
    np.testing.assert_array_equal(batches, again)


@pytest.mark.parametrize("count", [1, 7, 60, 99])
def test_held_out_images_have_the_classes_of_all(count):
    labels = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [50, 30, 20]))
    kept, held = in_memory.hold_out(labels, count)
    assert (len(held), len(kept)) == (count, 100 - count)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(100))
    shares = np.bincount(labels[held], minlength=3) - count * np.array([0.5, 0.3, 0.2])
    assert (np.abs(shares) < 1).all()


def test_images_are_held_out_by_chance():
    """Also where the data are sorted: not the first of each class, nor evenly spaced ones."""
    held = in_memory.hold_out(np.repeat([0, 1], 500), 100)[1]
    assert np.abs(np.mean(held % 500) - 249.5) < 60  # four deviations of such a mean
    assert len(set(np.diff(held))) > 5


def test_some_image_must_be_left_to_train_on():
    with pytest.raises(ConfigError, match="validation_images=9 leaves none of the 9 training"):
        in_memory.hold_out(np.zeros(9, np.int32), 9)


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
