"""Data sets opened by name: which batches they give, on one host and on two."""

import itertools
import warnings

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from common.config import ConfigError
from common.input import in_memory
from common.input.batch import PADDING
from common.input.open import open_data

PIXELS = np.random.default_rng(0).integers(0, 256, (50, 6, 6, 1), np.uint8)


def make_config(data="digits", **changes):
    config = {"data": data, "data_dir": "", "batch_size": 16, "seed": 0, "dtype": "float32"}
    config |= {"validation_images": 0, "normalization": ""}
    photos = {"image_size": 8, "resize": 10, "color_jitter": 0.2, "workers": 0}
    classes = {"num_classes": 4 if data in ("tfds", "folder", "synthetic") else 50}
    return ml_collections.ConfigDict({**config, **photos, **classes, **changes})


@pytest.fixture
def small_tfds(monkeypatch):
    """Thirty training and twenty test images, of any name, in place of a TFDS data set."""

    def load(name, data_dir, dtype=np.float32):
        images = PIXELS if dtype is np.uint8 else PIXELS.astype(np.float32) / 255
        labels = np.arange(50, dtype=np.int32)
        return in_memory.Dataset(images[:30], labels[:30], images[30:], labels[30:])

    monkeypatch.setattr(in_memory, "load_tfds", load)


def labels_of(batches):
    return np.concatenate([batch["label"] for batch in batches])


def test_digits():
    loader = open_data(make_config(dtype="bfloat16"))
    dataset = in_memory.load_digits()
    assert (loader.train_images, loader.eval_images) == (898, 899)
    first = next(loader.train(0))
    index = np.random.default_rng(0).permutation(898)[:16]
    np.testing.assert_array_equal(first["image"], dataset.train_images[index])
    np.testing.assert_array_equal(first["label"], dataset.train_labels[index])
    for preprocess in (loader.train_preprocess, loader.eval_preprocess):
        images = preprocess(first, jax.random.key(0))
        assert images.dtype == jnp.bfloat16
        np.testing.assert_array_equal(images, first["image"].astype(jnp.bfloat16))


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(ConfigError, match=r"num_classes=5, but the labels of digits go up to 9"):
        open_data(make_config(num_classes=5))


@pytest.mark.parametrize(
    ("labels", "message"),
    [(lambda y: np.where(y == 3, 12, y), "go up to 12"), (lambda y: y - 1, "begin at -1: give")],
)
def test_labels_out_of_range_are_refused(monkeypatch, labels, message):
    digits = in_memory.load_digits()
    changed = digits._replace(train_labels=labels(digits.train_labels))
    monkeypatch.setattr(in_memory, "load_digits", lambda: changed)
    with pytest.raises(ConfigError, match=message):
        open_data(make_config(num_classes=10))


def test_classes_without_images_are_reported():
    with pytest.warns(UserWarning, match=r"of 2 classes of digits, such as 10: is .*=12 right"):
        open_data(make_config(num_classes=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        open_data(make_config(num_classes=10))


def test_training_starts_from_any_step():
    loader = open_data(make_config())
    whole = list(itertools.islice(loader.train(0), 60))  # an epoch has 56 batches and a bit
    for expected, actual in zip(whole[55:], loader.train(55), strict=False):
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
    other = next(open_data(make_config(seed=1)).train(0))
    assert (other["image"] != whole[0]["image"]).any()


@pytest.mark.parametrize(("eval_batch_size", "sizes"), [(0, 57 * [16]), (400, 3 * [400])])
def test_evaluation_is_padded_to_full_batches(eval_batch_size, sizes):
    loader = open_data(make_config(eval_batch_size=eval_batch_size))
    batches = list(loader.evaluate(None))
    assert [len(batch["label"]) for batch in batches] == sizes
    labels, images = labels_of(batches), np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(labels[:899], in_memory.load_digits().test_labels)
    assert (labels[899:] == PADDING).all()
    assert not images[899:].any()


def test_evaluation_of_some_images_spreads_over_the_data(small_tfds):
    loader = open_data(make_config("cifar10"))
    for limit, expected in ((5, [30, 34, 38, 42, 46]), (6, [30, 33, 36, 40, 43, 46])):
        labels = labels_of(loader.evaluate(limit))
        np.testing.assert_array_equal(labels[labels >= 0], expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_validation_images_are_held_out_of_training(small_tfds, seed):
    """Labels are the numbers of the images: 0 to 29 to train on, 30 to 49 to test on."""
    loader = open_data(make_config("cifar10", batch_size=8, validation_images=6, seed=seed))
    assert (loader.train_images, loader.eval_images) == (24, 6)
    trained = labels_of(itertools.islice(loader.train(0), 3))
    held, tested = (labels_of(batches(None)) for batches in (loader.evaluate, loader.test))
    held, tested = held[held >= 0], tested[tested >= 0]
    assert set(trained) | set(held) == set(range(30))
    assert len(held) == 6
    np.testing.assert_array_equal(tested, np.arange(30, 50))
    labels = labels_of(loader.evaluation(test=True)(5))
    np.testing.assert_array_equal(labels[labels >= 0], [30, 34, 38, 42, 46])
    other = open_data(make_config("cifar10", validation_images=6))  # of seed 0
    others = labels_of(other.evaluate(None))
    np.testing.assert_array_equal(held, others[others >= 0])
    for batch in loader.train(0):
        np.testing.assert_array_equal(batch["image"], PIXELS[batch["label"]])
        break


def test_without_held_out_images_there_is_one_evaluation(small_tfds):
    loader = open_data(make_config("cifar10"))
    assert loader.test is None
    assert loader.evaluation(test=True) == loader.evaluation() == loader.evaluate


def test_hosts_share_out_every_batch(small_tfds, monkeypatch):
    config = make_config("cifar10", eval_batch_size=8)
    whole = open_data(config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    hosts = []
    for index in range(2):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        hosts.append(open_data(config))
    for batches, *parts in [
        [itertools.islice(loader.train(2), 3) for loader in (whole, *hosts)],
        [loader.evaluate(None) for loader in (whole, *hosts)],
    ]:
        for batch, *shares in zip(batches, *parts, strict=True):
            for name, array in batch.items():
                together = np.stack([share[name] for share in shares], axis=1)
                np.testing.assert_array_equal(together.reshape(array.shape), array)


def test_fashion_mnist_is_left_as_it_is(small_tfds):
    loader = open_data(make_config("fashion_mnist"))
    batch = next(loader.evaluate(None))
    assert batch["image"].dtype == np.float32
    images = loader.eval_preprocess(batch, jax.random.key(0))
    np.testing.assert_array_equal(images, PIXELS[30:46].astype(np.float32) / 255)


def test_cifar10_is_normalised_and_augmented(small_tfds):
    loader = open_data(make_config("cifar10"))
    batch = next(loader.evaluate(None))
    assert batch["image"].dtype == np.uint8
    batch = {"image": np.repeat(batch["image"], 3, axis=-1), "label": batch["label"]}
    images = np.asarray(loader.eval_preprocess(batch, jax.random.key(0)))
    expected = (batch["image"] / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    np.testing.assert_allclose(images, expected, atol=1e-5)
    one, other = (loader.train_preprocess(batch, jax.random.key(seed)) for seed in range(2))
    assert one.shape == images.shape
    assert (np.asarray(one) != np.asarray(other)).any()


def test_cifar10_is_normalised_as_imagenet_if_asked(small_tfds):
    loader = open_data(make_config("cifar10", normalization="imagenet"))
    batch = next(loader.evaluate(None))
    batch = {"image": np.repeat(batch["image"], 3, axis=-1), "label": batch["label"]}
    images = np.asarray(loader.eval_preprocess(batch, jax.random.key(0)))
    expected = (batch["image"] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(images, expected, atol=1e-5)


def test_photos_are_evaluated_in_batches_of_their_own(photos):
    config = make_config("folder", data_dir=str(photos), batch_size=8, eval_batch_size=16)
    loader = open_data(config)
    assert (loader.train_images, loader.eval_images) == (40, 16)
    assert len(next(loader.train(0))["label"]) == 8
    assert [len(batch["label"]) for batch in loader.evaluate(None)] == [16]


def test_noise_is_evaluated_in_batches_of_its_own():
    loader = open_data(make_config("synthetic", batch_size=8, eval_batch_size=40))
    assert next(loader.train(5))["image"].shape == (8, 8, 8, 3)
    assert [len(batch["label"]) for batch in loader.evaluate(100)] == [40, 40]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 12}, "^batch_size=12 cannot be shared by 8 devices"),
        ({"eval_batch_size": 12}, "^eval_batch_size=12 cannot be shared by 8 devices"),
        ({"data": "folder", "validation_images": 5}, "=5 is not offered for data=folder, only for"),
        ({"data": "web"}, "'web' is none of digits, fashion_mnist, cifar10, tfds, folder, synth"),
    ],
)
def test_impossible_configs_are_rejected(changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(make_config(**changes))


def test_a_folder_must_be_named():
    with pytest.raises(FileNotFoundError, match=r"--config\.data_dir=DIR"):
        open_data(make_config("folder"))
