"""Layers the networks share, which compute as PyTorch's do.

Parameters are float32; the computation may have another dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def conv(
    features_in: int,
    features_out: int,
    size: int,
    stride: int = 1,
    padding: int | None = None,
    *,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Makes a square convolution without bias, He initialised by fan-out.

    Args:
      features_in: channels of the input.
      features_out: channels of the output.
      size: side of the kernel, odd.
      stride: step between two positions.
      padding: zeros on every side; None: as many as keep the size at stride 1. ("SAME" pads
        differently from PyTorch.)
      dtype: of the computation and the output.
      rngs: where the kernel comes from.
    """
    return nnx.Conv(
        features_in,
        features_out,
        (size, size),
        strides=stride,
        padding=size // 2 if padding is None else padding,
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.variance_scaling(2.0, "fan_out", "normal"),
        rngs=rngs,
    )


MOMENTUM = 0.9  # of the running statistics


def batch_norm(
    features: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.BatchNorm:
    """Makes a batch normalization in float32; only its result is rounded to `dtype`."""
    return nnx.BatchNorm(
        features,
        momentum=MOMENTUM,
        epsilon=epsilon,
        dtype=dtype,
        promote_dtype=_unrounded,
        rngs=rngs,
    )


def rms_norm(
    features: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.RMSNorm:
    """Makes an RMS normalization in float32; only its result is rounded to `dtype`."""
    return nnx.RMSNorm(features, epsilon=epsilon, dtype=dtype, promote_dtype=_unrounded, rngs=rngs)


def _unrounded(values: Any, /, **kwargs: Any) -> Any:
    """Replaces Flax's promotion, which in evaluation mode rounds the statistics to `dtype`."""
    del kwargs
    return values


def head(features_in: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Makes the last layer, in float32 whatever the others compute in."""
    return nnx.Linear(features_in, num_classes, dtype=jnp.float32, rngs=rngs)


class Dropout(nnx.Dropout):
    """Flax's dropout, which draws from the call's `rngs` and does nothing in evaluation mode.

    jax2onnx 0.17 replaces Flax's call by one that rejects `rngs`; in evaluation mode this class
    never makes it.
    """

    def __call__(self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:  # type: ignore[override]
        return inputs if self.deterministic else super().__call__(inputs, rngs=rngs)


def max_pool(
    images: jax.Array, size: int, stride: int, padding: int = 0, *, ceil_mode: bool = False
) -> jax.Array:
    """Max pooling (NHWC); as in PyTorch, `ceil_mode` adds a window that reaches over the edge."""

    def pads(length: int) -> tuple[int, int]:
        over = (size - length - 2 * padding) % stride if ceil_mode else 0
        return padding, padding + over

    height, width = images.shape[1:3]
    # Padded here, because jax2onnx 0.17 silently drops the padding of nnx.max_pool.
    images = jnp.pad(images, ((0, 0), pads(height), pads(width), (0, 0)), constant_values=-jnp.inf)
    return nnx.max_pool(
        images, window_shape=(size, size), strides=(stride, stride), padding="VALID"
    )
