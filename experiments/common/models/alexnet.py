"""AlexNet with batch normalization and no dropout, as in the paper's experiments."""

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.models.layers import batch_norm, conv, head, max_pool

_EPSILON = 1e-4


def _pool(x: jax.Array) -> jax.Array:
    return max_pool(x, 3, stride=2)


class AlexNet(nnx.Module):
    """Five convolutions and three dense layers, for images of 224x224.

    Every layer but the last has batch normalization and no bias. Layers are numbered as in the
    authors' PyTorch module, which counts activations and poolings too: `features/4/kernel` is the
    second convolution.

    Args:
      num_classes: number of logits.
      dtype: of the computation; parameters, statistics and logits are float32.
      rngs: where the weights come from.
    """

    constrained = "features/(4|8|11|14)/kernel|classifier/[03]/kernel"
    flattened: ClassVar[dict[str, tuple[int, int, int]]] = {"classifier/0/kernel": (6, 6, 256)}

    def __init__(self, num_classes: int = 1000, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        def normalized(layer: nnx.Module, features: int) -> list[Callable[[jax.Array], jax.Array]]:
            return [layer, batch_norm(features, epsilon=_EPSILON, dtype=dtype, rngs=rngs), nnx.relu]

        def convolution(
            features_in: int,
            features_out: int,
            size: int,
            stride: int = 1,
            padding: int | None = None,
        ) -> list:
            layer = conv(features_in, features_out, size, stride, padding, dtype=dtype, rngs=rngs)
            return normalized(layer, features_out)

        def dense(features_in: int, features_out: int) -> list:
            layer = nnx.Linear(features_in, features_out, use_bias=False, dtype=dtype, rngs=rngs)
            return normalized(layer, features_out)

        self.features = nnx.List(
            [
                *convolution(3, 64, 11, stride=4, padding=2),
                _pool,
                *convolution(64, 192, 5),
                _pool,
                *convolution(192, 384, 3),
                *convolution(384, 256, 3),
                *convolution(256, 256, 3),
                _pool,
            ]
        )
        self.classifier = nnx.List(
            [*dense(6 * 6 * 256, 4096), *dense(4096, 4096), head(4096, num_classes, rngs=rngs)]
        )

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 logits (n, num_classes) for normalised images (n, 224, 224, 3).

        Ignores `rngs`.
        """
        del rngs
        x = images
        for layer in self.features:
            x = layer(x)
        x = x.reshape(x.shape[0], -1)
        for layer in self.classifier:
            x = layer(x)
        return x
