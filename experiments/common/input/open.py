"""The data of the long runs, as batches from any step on: ImageNet from the disk, CIFAR-10 from memory, or noise."""

import itertools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from common.input import augment as images
from common.input import in_memory as data
from common.input import pipeline
from common.input.sources import FolderSource, Source, TfdsSource
from common.training.step import Batch, Preprocess

# Of CIFAR-10's training pixels, in [0, 1].
_CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
_CIFAR_STD = (0.2470, 0.2435, 0.2616)
_CIFAR_PADDING = 4
_SYNTHETIC_IMAGES = (100_000, 1_000)

Batches = Iterator[dict[str, np.ndarray]]


class Loader(NamedTuple):
    """A data set, as the batches of this host."""

    train_images: int
    eval_images: int
    train: Callable[[int], Batches]  # endless, from a step on
    evaluate: Callable[
        [int | None], Batches
    ]  # once through, or through so many images spread over the data
    train_preprocess: Preprocess
    eval_preprocess: Preprocess


def open_data(config: ml_collections.ConfigDict) -> Loader:
    """The data set that `config.data` names: "tfds" and "folder" are ImageNet, then "cifar10" and
    "synthetic".

    Raises:
      FileNotFoundError: if the data are not there; it says what was expected.
      ValueError: if the name is unknown, or the devices cannot share a batch evenly.
    """
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"batch_size={config.batch_size} cannot be shared by {jax.device_count()} devices: give a multiple"
        )
    if config.data in ("tfds", "folder"):
        return _imagenet(config)
    if config.data == "cifar10":
        return _cifar10(config)
    if config.data == "synthetic":
        return _synthetic(config)
    raise ValueError(f"--config.data={config.data!r} is none of tfds, folder, cifar10, synthetic")


def _imagenet(config: ml_collections.ConfigDict) -> Loader:
    train_source, eval_source = _sources(config)
    share = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "num_classes": config.num_classes,
    }
    workers = (os.cpu_count() or 1) if config.workers < 0 else config.workers

    def train(start: int) -> Batches:
        return pipeline.train_batches(
            train_source,
            batch_size=_host_batch_size(config),
            seed=config.seed,
            start=start,
            num_workers=workers,
            size=config.image_size,
            color_jitter=config.color_jitter,
            **share,
        )

    def evaluate(limit: int | None) -> Batches:
        return pipeline.eval_batches(
            eval_source,
            batch_size=_host_batch_size(config),
            num_workers=workers,
            size=config.image_size,
            resize=config.resize,
            limit=limit,
            **share,
        )

    preprocess = _preprocess(config)
    return Loader(len(train_source), len(eval_source), train, evaluate, preprocess, preprocess)


def _sources(config: ml_collections.ConfigDict) -> tuple[Source, Source]:
    if config.data == "tfds":
        folder = config.data_dir or None
        return TfdsSource("imagenet2012", "train", folder), TfdsSource(
            "imagenet2012", "validation", folder
        )
    if not config.data_dir:
        raise FileNotFoundError(
            "--config.data=folder needs --config.data_dir=DIR, with DIR/train/<class> and DIR/val/<class>"
        )
    return FolderSource(config.data_dir, "train"), FolderSource(config.data_dir, "val")


def _synthetic(config: ml_collections.ConfigDict) -> Loader:
    """Noise, to measure the machine without the disk."""
    train_images, eval_images = _SYNTHETIC_IMAGES

    def batches(jitter: float | None, count: int | None) -> Batches:
        return pipeline.synthetic_batches(
            batch_size=_host_batch_size(config),
            num_classes=config.num_classes,
            seed=config.seed,
            process_index=jax.process_index(),
            size=config.image_size,
            color_jitter=jitter,
            count=count,
        )

    def train(start: int) -> Batches:
        del start  # all batches are the same
        return batches(config.color_jitter, None)

    def evaluate(limit: int | None) -> Batches:
        return batches(None, max(min(limit or eval_images, eval_images) // config.batch_size, 1))

    preprocess = _preprocess(config)
    return Loader(train_images, eval_images, train, evaluate, preprocess, preprocess)


def _preprocess(config: ml_collections.ConfigDict) -> Preprocess:
    dtype = jnp.dtype(config.dtype)

    def preprocess(batch: Batch, key: jax.Array) -> jax.Array:
        del key  # what is random was drawn with the data
        return images.preprocess(batch, dtype)

    return preprocess


def _cifar10(config: ml_collections.ConfigDict) -> Loader:
    """From TFDS, in memory; random crops after padding by 4, and flips, are drawn on the device."""
    dataset = data.load_tfds("cifar10", config.data_dir or None, np.uint8)
    dtype = jnp.dtype(config.dtype)
    host, hosts = jax.process_index(), jax.process_count()

    def normalize(batch: Batch, key: jax.Array) -> jax.Array:
        del key
        scaled = jnp.asarray(batch["image"]).astype(jnp.float32) / 255
        return ((scaled - jnp.array(_CIFAR_MEAN)) / jnp.array(_CIFAR_STD)).astype(dtype)

    def augment(batch: Batch, key: jax.Array) -> jax.Array:
        return random_crop_and_flip(normalize(batch, key), key, _CIFAR_PADDING)

    def train(start: int) -> Batches:
        order = data.shuffled_batches(len(dataset.train_labels), config.batch_size, config.seed)
        for index in itertools.islice(order, start, None):
            mine = index[host::hosts]
            yield {"image": dataset.train_images[mine], "label": dataset.train_labels[mine]}

    def evaluate(limit: int | None) -> Batches:
        every = max(len(dataset.test_labels) // limit, 1) if limit else 1
        for batch in data.padded_batches(
            dataset.test_images[::every], dataset.test_labels[::every], config.batch_size
        ):
            yield {name: array[host::hosts] for name, array in batch.items()}

    return Loader(
        len(dataset.train_labels), len(dataset.test_labels), train, evaluate, augment, normalize
    )


def random_crop_and_flip(photos: jax.Array, key: jax.Array, padding: int) -> jax.Array:
    """Each image moved by up to `padding` pixels each way, zero beyond its edge, and mirrored half
    of the time.

    Args:
      photos: shape=(batch, height, width, channels), normalised or not.
      key: a random key.
      padding: pixels.

    Returns:
      Images of the same shape and dtype.
    """
    shift_key, flip_key = jax.random.split(key)
    batch, height, width, channels = photos.shape
    padded = jnp.pad(photos, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifts = jax.random.randint(shift_key, (batch, 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, shifts)
    return jnp.where(flips, cropped[:, :, ::-1], cropped)


def _host_batch_size(config: ml_collections.ConfigDict) -> int:
    """Images of a step that this host provides."""
    return config.batch_size // jax.process_count()
