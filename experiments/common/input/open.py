"""Opens a config's data set: photos from the disk, small data sets from memory, text, or noise."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from common.config import ConfigError
from common.input import augment, in_memory, pipeline
from common.input.batch import Batch, HostBatch, Loader, Preprocess, eval_batch_size
from common.input.sources import FolderSource, Source, TfdsSource
from common.input.text import text_loader

# Mean and deviation of the training pixels, in [0, 1].
_NORMALIZATIONS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": (augment.MEAN, augment.STD),
}
_CIFAR_PADDING = 4
_IN_MEMORY = ("digits", "fashion_mnist", "cifar10")
_SYNTHETIC_IMAGES = (100_000, 1_000)


def open_data(config: ml_collections.ConfigDict) -> Loader:
    """Opens the data set that `config.data` names; "tfds" and "folder" are ImageNet.

    Raises:
      FileNotFoundError: if the data are not there; it says what was expected.
      ConfigError: if the name is unknown, the devices cannot share a batch evenly, or validation
        images cannot be held out.
    """
    sizes, devices = (config.batch_size, eval_batch_size(config)), jax.device_count()
    for field, size in zip(("batch_size", "eval_batch_size"), sizes, strict=True):
        if size % devices:
            raise ConfigError(
                f"{field}={size} cannot be shared by {devices} devices: give a multiple"
            )
    if config.data not in _LOADERS:
        raise ConfigError(f"--config.data={config.data!r} is none of {', '.join(_LOADERS)}")
    if config.validation_images and config.data not in _IN_MEMORY:
        raise ConfigError(
            f"--config.validation_images={config.validation_images} is not offered for "
            f"data={config.data}, only for {', '.join(_IN_MEMORY)}: give 0"
        )
    return _LOADERS[config.data](config)


def _digits(config: ml_collections.ConfigDict) -> Loader:
    cast = _cast(config)
    return in_memory.in_memory_loader(in_memory.load_digits(), config, cast, cast)


def _fashion_mnist(config: ml_collections.ConfigDict) -> Loader:
    cast = _cast(config)
    dataset = in_memory.load_tfds("fashion_mnist", config.data_dir or None)
    return in_memory.in_memory_loader(dataset, config, cast, cast)


def _cifar10(config: ml_collections.ConfigDict) -> Loader:
    """Random crops of the image padded by 4 pixels, and flips, are drawn on the device."""
    normalize = _normalize(config, *_NORMALIZATIONS[config.normalization or "cifar10"])

    def train_preprocess(batch: Batch, key: jax.Array) -> jax.Array:
        return augment.random_crop_and_flip(normalize(batch, key), key, _CIFAR_PADDING)

    dataset = in_memory.load_tfds("cifar10", config.data_dir or None, np.uint8)
    return in_memory.in_memory_loader(dataset, config, train_preprocess, normalize)


def _tfds(config: ml_collections.ConfigDict) -> Loader:
    open_split = functools.partial(TfdsSource, "imagenet2012", data_dir=config.data_dir or None)
    return _photos(config, open_split("train"), open_split("validation"))


def _folder(config: ml_collections.ConfigDict) -> Loader:
    if not config.data_dir:
        raise FileNotFoundError(
            "--config.data=folder needs --config.data_dir=DIR, with DIR/train/<class> and "
            "DIR/val/<class>"
        )
    open_split = functools.partial(FolderSource, config.data_dir)
    return _photos(config, open_split("train"), open_split("val"))


def _photos(config: ml_collections.ConfigDict, train_source: Source, eval_source: Source) -> Loader:
    shared = {
        "num_workers": (os.cpu_count() or 1) if config.workers < 0 else config.workers,
        "num_classes": config.num_classes,
        "size": config.image_size,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }

    def train(start: int) -> Iterator[HostBatch]:
        return pipeline.train_batches(
            train_source,
            batch_size=config.batch_size // jax.process_count(),
            seed=config.seed,
            start=start,
            color_jitter=config.color_jitter,
            **shared,
        )

    def evaluate(limit: int | None) -> Iterator[HostBatch]:
        return pipeline.eval_batches(
            eval_source,
            batch_size=eval_batch_size(config) // jax.process_count(),
            resize=config.resize,
            limit=limit,
            **shared,
        )

    normalize = _normalize(config)
    return Loader(len(train_source), len(eval_source), train, evaluate, normalize, normalize)


def _synthetic(config: ml_collections.ConfigDict) -> Loader:
    """Noise, to measure the machine without its disk."""
    train_images, eval_images = _SYNTHETIC_IMAGES
    batches = functools.partial(
        pipeline.synthetic_batches,
        num_classes=config.num_classes,
        seed=config.seed,
        process_index=jax.process_index(),
        size=config.image_size,
    )

    def train(start: int) -> Iterator[HostBatch]:
        del start  # all batches are the same
        batch_size = config.batch_size // jax.process_count()
        return batches(batch_size=batch_size, color_jitter=config.color_jitter)

    def evaluate(limit: int | None) -> Iterator[HostBatch]:
        size = eval_batch_size(config)
        count = max(min(limit or eval_images, eval_images) // size, 1)
        return batches(batch_size=size // jax.process_count(), color_jitter=None, count=count)

    normalize = _normalize(config)
    return Loader(train_images, eval_images, train, evaluate, normalize, normalize)


def _cast(config: ml_collections.ConfigDict) -> Preprocess:
    """The images as they are, in the dtype of the computation."""
    dtype = jnp.dtype(config.dtype)

    def cast(batch: Batch, key: jax.Array) -> jax.Array:
        del key
        return jnp.asarray(batch["image"]).astype(dtype)

    return cast


def _normalize(
    config: ml_collections.ConfigDict,
    mean: Sequence[float] = augment.MEAN,
    std: Sequence[float] = augment.STD,
) -> Preprocess:
    dtype = jnp.dtype(config.dtype)

    def normalize(batch: Batch, key: jax.Array) -> jax.Array:
        del key  # random crops and jitter factors come with the batch
        return augment.preprocess(batch, dtype, mean, std)

    return normalize


_LOADERS: dict[str, Callable[[ml_collections.ConfigDict], Loader]] = {
    "digits": _digits,
    "fashion_mnist": _fashion_mnist,
    "cifar10": _cifar10,
    "tfds": _tfds,
    "folder": _folder,
    "synthetic": _synthetic,
    "text": text_loader,
}
