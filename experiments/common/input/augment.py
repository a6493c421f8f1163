"""Image arithmetic on the device: colour jitter, normalisation, random crops and flips.

Every function treats each image on its own, so a batch may be sharded in any way.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels in [0, 1], as pre-trained networks expect
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)  # ITU-R 601


def preprocess(
    batch: Mapping[str, ArrayLike],
    dtype: DTypeLike = jnp.float32,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> jax.Array:
    """Normalises a batch's images, after colour jitter if the batch has jitter factors.

    Args:
      batch: "image" is uint8, shape=(B, H, W, 3); "jitter", if present, holds the factors of
        brightness, contrast and saturation, shape=(B, 3).
      dtype: of the result; the arithmetic is in float32.
      mean: of each channel, for pixels in [0, 1].
      std: of each channel.

    Returns:
      (image / 255 - mean) / std, shape=(B, H, W, 3).
    """
    images = jnp.asarray(batch["image"]).astype(jnp.float32) / 255
    if "jitter" in batch:
        images = jitter_colors(images, jnp.asarray(batch["jitter"]))
    return ((images - jnp.array(mean)) / jnp.array(std)).astype(dtype)


def jitter_colors(images: jax.Array, factors: jax.Array) -> jax.Array:
    """Changes brightness, contrast and saturation, in this order (torchvision's is random).

    A factor f gives f * image + (1 - f) * other, clipped to [0, 1], where the other image is black
    for brightness, the image's mean grey for contrast, and each pixel's grey for saturation. A
    factor of 1 changes nothing.

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
    # Not a matrix product, which may lose digits on accelerators.
    return (images * jnp.array(GREY)).sum(axis=-1, keepdims=True)


def _blend(images: jax.Array, other: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(factor * images + (1 - factor) * other, 0, 1)


def random_crop_and_flip(images: jax.Array, key: jax.Array, padding: int) -> jax.Array:
    """Shifts each image by up to `padding` pixels each way, over zeros, and mirrors half of them.

    Args:
      images: shape=(B, H, W, C), normalised or not.
      key: a random key.
      padding: pixels.

    Returns:
      Images of the same shape and dtype.
    """
    shift_key, flip_key = jax.random.split(key)
    batch, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    shifts = jax.random.randint(shift_key, (batch, 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))

    def crop(image: jax.Array, shift: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (shift[0], shift[1], 0), (height, width, channels))

    cropped = jax.vmap(crop)(padded, shifts)
    return jnp.where(flips, cropped[:, :, ::-1], cropped)
