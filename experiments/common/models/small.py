"""Two small networks, narrow enough that low-bit weights cost accuracy.

Their first and last layers stay in full precision.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.models.layers import batch_norm, head


class SmallConvNet(nnx.Module):
    """Three 3x3 convolutions, the second of stride 2, global pooling and a linear head.

    Args:
      num_classes: number of logits.
      channels: of the first convolution; the others have twice as many.
      dtype: of the computation; parameters, statistics and logits are float32.
      rngs: where the weights come from.
    """

    constrained = "conv[23]/kernel"
    flattened: ClassVar[dict[str, tuple[int, int, int]]] = {}

    def __init__(
        self,
        num_classes: int = 10,
        channels: int = 6,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def layer(features_in: int, features: int, stride: int) -> tuple[nnx.Conv, nnx.BatchNorm]:
            conv = nnx.Conv(
                features_in,
                features,
                (3, 3),
                strides=stride,
                padding="SAME",
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
            )
            return conv, batch_norm(features, dtype=dtype, rngs=rngs)

        self.conv1, self.bn1 = layer(1, channels, 1)
        self.conv2, self.bn2 = layer(channels, 2 * channels, 2)
        self.conv3, self.bn3 = layer(2 * channels, 2 * channels, 1)
        self.head = head(2 * channels, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 logits (n, num_classes) for images (n, h, w, 1); ignores `rngs`."""
        del rngs
        x = nnx.relu(self.bn1(self.conv1(images)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        x = nnx.relu(self.bn3(self.conv3(x)))
        return self.head(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


class SmallMLP(nnx.Module):
    """Four hidden layers with batch normalization; all but the first are constrained.

    Args:
      num_classes: number of logits.
      features_in: pixels of an image.
      width: of the hidden layers.
      dtype: of the computation; parameters, statistics and logits are float32.
      rngs: where the weights come from.
    """

    constrained = "hidden[123]/kernel"
    flattened: ClassVar[dict[str, tuple[int, int, int]]] = {}

    def __init__(
        self,
        num_classes: int = 10,
        features_in: int = 784,
        width: int = 64,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def layer(features: int) -> tuple[nnx.Linear, nnx.BatchNorm]:
            dense = nnx.Linear(features, width, use_bias=False, dtype=dtype, rngs=rngs)
            return dense, batch_norm(width, dtype=dtype, rngs=rngs)

        self.hidden0, self.bn0 = layer(features_in)
        self.hidden1, self.bn1 = layer(width)
        self.hidden2, self.bn2 = layer(width)
        self.hidden3, self.bn3 = layer(width)
        self.head = head(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 logits (n, num_classes) for n images; ignores `rngs`."""
        del rngs
        x = images.reshape(images.shape[0], -1)
        x = nnx.relu(self.bn0(self.hidden0(x)))
        x = nnx.relu(self.bn1(self.hidden1(x)))
        x = nnx.relu(self.bn2(self.hidden2(x)))
        x = nnx.relu(self.bn3(self.hidden3(x)))
        return self.head(x)
