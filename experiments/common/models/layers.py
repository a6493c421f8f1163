"""What the networks share: layers that compute as PyTorch's do, with float32 parameters and any compute dtype."""

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
    """A square convolution without bias, He initialised by its fan-out.

    Args:
      features_in: channels of the input.
      features_out: channels of the output.
      size: side of the kernel, odd.
      stride: step between two positions.
      padding: zeros on every side; None for as many as keep the size at stride 1. "SAME" would pad
        otherwise than PyTorch.
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


def batch_norm(
    features: int, *, epsilon: float = 1e-5, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.BatchNorm:
    """Batch normalization with the statistics in float32; only the result is rounded to `dtype`."""
    return nnx.BatchNorm(
        features, momentum=0.9, epsilon=epsilon, dtype=dtype, promote_dtype=_unrounded, rngs=rngs
    )


def _unrounded(values: Any, /, **kwargs: Any) -> Any:
    """Instead of Flax's promotion, which in evaluation mode rounds mean and variance to the compute dtype."""
    del kwargs
    return values


def head(features_in: int, num_classes: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """The last layer, in float32 whatever the rest computes in."""
    return nnx.Linear(features_in, num_classes, dtype=jnp.float32, rngs=rngs)


class Dropout(nnx.Dropout):
    """Flax's dropout, drawing from the `rngs` of the call, which in evaluation mode does nothing at
    all.

    jax2onnx 0.17 replaces the call of Flax's by one that refuses `rngs`; in evaluation mode this
    one never gets there.
    """

    def __call__(self, inputs: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:  # type: ignore[override]
        return inputs if self.deterministic else super().__call__(inputs, rngs=rngs)


def max_pool(
    images: jax.Array, size: int, stride: int, padding: int = 0, *, ceil_mode: bool = False
) -> jax.Array:
    """Max pooling, shape=(n, h, w, c) in and out; `ceil_mode` has a last window that reaches over the edge, as in PyTorch."""

    def pads(length: int) -> tuple[int, int]:
        over = (size - length - 2 * padding) % stride if ceil_mode else 0
        return padding, padding + over

    height, width = images.shape[1:3]
    # Padded here and not by the pooling, because jax2onnx 0.17 drops the padding of nnx.max_pool
    # without a word.
    images = jnp.pad(images, ((0, 0), pads(height), pads(width), (0, 0)), constant_values=-jnp.inf)
    return nnx.max_pool(
        images, window_shape=(size, size), strides=(stride, stride), padding="VALID"
    )
