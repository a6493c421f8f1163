"""The arithmetic on photos that the device does: colour jitter and normalisation. Each image by itself, so any sharding will do."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], as pre-trained networks expect
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)  # ITU-R 601


def preprocess(batch: Mapping[str, ArrayLike], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Normalised images from a batch of the pipeline, jittered if the batch says how.

    Args:
      batch: "image" is uint8, shape=(B, H, W, 3); "jitter", if there, holds the factors of
        brightness, contrast and saturation, shape=(B, 3).
      dtype: of the result; the arithmetic is in float32.

    Returns:
      (image - mean) / std, shape=(B, H, W, 3).
    """
    images = jnp.asarray(batch["image"]).astype(jnp.float32) / 255
    if "jitter" in batch:
        images = jitter_colors(images, jnp.asarray(batch["jitter"]))
    return ((images - jnp.array(MEAN)) / jnp.array(STD)).astype(dtype)


def jitter_colors(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Brightness, contrast and saturation, one after the other (torchvision's ColorJitter draws the
    order, too).

    A factor f blends: f * image + (1 - f) * other, where the other is black, the mean grey of the
    image, and the grey of the pixel; 1 changes nothing. The result of each is clipped to [0, 1].

    Args:
      images: in [0, 1], shape=(B, H, W, 3).
      factors: shape=(B, 3).

    Returns:
      shape=(B, H, W, 3).
    """
    brightness, contrast, saturation = jnp.moveaxis(factors[:, :, None, None, None], 1, 0)
    images = jnp.clip(brightness * images, 0, 1)
    images = _blend(images, _grey(images).mean(axis=(1, 2), keepdims=True), contrast)
    return _blend(images, _grey(images), saturation)


def _grey(images: jax.Array) -> jax.Array:
    return (images * jnp.array(GREY)).sum(
        axis=-1, keepdims=True
    )  # no matrix product: those may lose digits on accelerators


def _blend(images: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(factor * images + (1 - factor) * other, 0, 1)
