"""Two small networks, narrow enough that low-bit weights cost something. Their first and last layers stay in full precision."""

import jax
import jax.numpy as jnp
from flax import nnx


class SmallConvNet(nnx.Module):
    """Three 3x3 convolutions with batch normalization, the second of stride 2, then global pooling and a linear head."""

    constrained = "conv[23]/kernel"

    def __init__(self, num_classes: int, channels: int, *, rngs: nnx.Rngs):
        def conv(features_in: int, features_out: int, stride: int = 1) -> nnx.Conv:
            return nnx.Conv(
                features_in,
                features_out,
                (3, 3),
                strides=stride,
                padding="SAME",
                use_bias=False,
                rngs=rngs,
            )

        self.conv1, self.bn1 = conv(1, channels), nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.conv2, self.bn2 = (
            conv(channels, 2 * channels, stride=2),
            nnx.BatchNorm(2 * channels, momentum=0.9, rngs=rngs),
        )
        self.conv3, self.bn3 = (
            conv(2 * channels, 2 * channels),
            nnx.BatchNorm(2 * channels, momentum=0.9, rngs=rngs),
        )
        self.head = nnx.Linear(2 * channels, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # nothing is dropped
        x = nnx.relu(self.bn1(self.conv1(images)))
        x = nnx.relu(self.bn2(self.conv2(x)))
        x = nnx.relu(self.bn3(self.conv3(x)))
        return self.head(jnp.mean(x, axis=(1, 2)))


class SmallMLP(nnx.Module):
    """Four hidden layers with batch normalization; the three square ones between the first and the head are constrained."""

    constrained = "hidden[123]/kernel"

    def __init__(self, num_classes: int, features_in: int, width: int, *, rngs: nnx.Rngs):
        def dense(features: int) -> nnx.Linear:
            return nnx.Linear(features, width, use_bias=False, rngs=rngs)

        self.hidden0, self.bn0 = dense(features_in), nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.hidden1, self.bn1 = dense(width), nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.hidden2, self.bn2 = dense(width), nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.hidden3, self.bn3 = dense(width), nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        del rngs  # nothing is dropped
        x = images.reshape(images.shape[0], -1)
        x = nnx.relu(self.bn0(self.hidden0(x)))
        x = nnx.relu(self.bn1(self.hidden1(x)))
        x = nnx.relu(self.bn2(self.hidden2(x)))
        x = nnx.relu(self.bn3(self.hidden3(x)))
        return self.head(x)
