"""GoogLeNet (Szegedy et al. 2015) with batch normalization, as torchvision has it."""

import functools
from collections.abc import Callable, Iterable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.models.layers import Dropout, batch_norm, conv, head, max_pool

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ConvNorm(nnx.Module):
    """Convolution, batch normalization, ReLU."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int,
        stride: int = 1,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = conv(features_in, features_out, size, stride, dtype=dtype, rngs=rngs)
        self.bn = batch_norm(features_out, epsilon=1e-3, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.bn(self.conv(x)))


class Inception(nnx.Module):
    """Four parallel branches: 1x1, 3x3, again 3x3 (torchvision has no 5x5) and max pooling.

    Args:
      features_in: channels of the input.
      ones: channels of the first branch.
      threes: channels of the second branch's two convolutions.
      fives: channels of the third branch's two convolutions.
      pooled: channels of the fourth branch.
      dtype: of the computation.
      rngs: where the weights come from.
    """

    def __init__(
        self,
        features_in: int,
        ones: int,
        threes: tuple[int, int],
        fives: tuple[int, int],
        pooled: int,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def layer(features_in: int, features_out: int, size: int) -> ConvNorm:
            return ConvNorm(features_in, features_out, size, dtype=dtype, rngs=rngs)

        self.branch1 = layer(features_in, ones, 1)
        self.branch2 = nnx.List([layer(features_in, threes[0], 1), layer(*threes, 3)])
        self.branch3 = nnx.List([layer(features_in, fives[0], 1), layer(*fives, 3)])
        self.branch4: nnx.List[Callable[[jax.Array], jax.Array]] = nnx.List(
            [_pool, layer(features_in, pooled, 1)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        others = (_chain(branch, x) for branch in (self.branch2, self.branch3, self.branch4))
        return jnp.concatenate([self.branch1(x), *others], axis=-1)


class AuxiliaryHead(nnx.Module):
    """A classifier halfway through, for training only: it keeps gradients large."""

    def __init__(self, features_in: int, num_classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = ConvNorm(features_in, 128, 1, dtype=dtype, rngs=rngs)
        self.fc1 = nnx.Linear(4 * 4 * 128, 1024, dtype=dtype, rngs=rngs)
        self.dropout = Dropout(0.7)
        self.fc2 = head(1024, num_classes, rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        x = self.conv(_window_means(_window_means(x, 4, axis=1), 4, axis=2))
        x = nnx.relu(self.fc1(x.reshape(x.shape[0], -1)))
        return self.fc2(self.dropout(x, rngs=rngs))


class GoogLeNet(nnx.Module):
    """Nine Inception blocks, for images of 224x224.

    Args:
      num_classes: number of logits.
      auxiliary_heads: adds two classifiers in training mode; dropped afterwards, so never
        constrained.
      transform_input: renormalises images from ImageNet's mean and deviation to 0.5 and 0.5, which
        torchvision's pre-trained weights need and weights trained here do not.
      dtype: of the computation; parameters, statistics and logits are float32.
      rngs: where the weights come from; dropout draws from the `rngs` of the call.
    """

    constrained = "conv[23]/conv/kernel|inception.*/kernel"
    flattened: ClassVar[dict[str, tuple[int, int, int]]] = {
        "aux1/fc1/kernel": (4, 4, 128),
        "aux2/fc1/kernel": (4, 4, 128),
    }

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        auxiliary_heads: bool = True,
        transform_input: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inception = functools.partial(Inception, dtype=dtype, rngs=rngs)

        def auxiliary(features_in: int) -> AuxiliaryHead | None:
            if not auxiliary_heads:
                return None
            return AuxiliaryHead(features_in, num_classes, dtype=dtype, rngs=rngs)

        self.auxiliary_heads, self.transform_input = auxiliary_heads, transform_input
        self.conv1 = ConvNorm(3, 64, 7, stride=2, dtype=dtype, rngs=rngs)
        self.conv2 = ConvNorm(64, 64, 1, dtype=dtype, rngs=rngs)
        self.conv3 = ConvNorm(64, 192, 3, dtype=dtype, rngs=rngs)
        self.inception3a = inception(192, 64, (96, 128), (16, 32), 32)
        self.inception3b = inception(256, 128, (128, 192), (32, 96), 64)
        self.inception4a = inception(480, 192, (96, 208), (16, 48), 64)
        self.inception4b = inception(512, 160, (112, 224), (24, 64), 64)
        self.inception4c = inception(512, 128, (128, 256), (24, 64), 64)
        self.inception4d = inception(512, 112, (144, 288), (32, 64), 64)
        self.inception4e = inception(528, 256, (160, 320), (32, 128), 128)
        self.inception5a = inception(832, 256, (160, 320), (32, 128), 128)
        self.inception5b = inception(832, 384, (192, 384), (48, 128), 128)
        self.aux1, self.aux2 = auxiliary(512), auxiliary(528)
        self.dropout = Dropout(0.2)
        self.fc = head(1024, num_classes, rngs=rngs)

    def __call__(
        self, images: jax.Array, *, rngs: nnx.Rngs | None = None
    ) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
        """Returns float32 logits.

        Args:
          images: normalised by ImageNet's mean and deviation, shape=(n, height, width, 3).
          rngs: for dropout; needed in training mode only.

        Returns:
          Logits, shape=(n, num_classes); in training mode with auxiliary heads a tuple of the
          logits, those of the first head and those of the second.
        """
        x = images
        if self.transform_input:
            x = (x * jnp.array(_STD) + jnp.array(_MEAN) - 0.5) / 0.5
        x = max_pool(self.conv1(x), 3, stride=2, ceil_mode=True)
        x = max_pool(self.conv3(self.conv2(x)), 3, stride=2, ceil_mode=True)
        x = self.inception3b(self.inception3a(x))
        x = x4a = self.inception4a(max_pool(x, 3, stride=2, ceil_mode=True))
        x = x4d = _chain([self.inception4b, self.inception4c, self.inception4d], x)
        x = max_pool(self.inception4e(x), 2, stride=2, ceil_mode=True)
        x = self.inception5b(self.inception5a(x))
        x = self.dropout(jnp.mean(x, axis=(1, 2), dtype=jnp.float32), rngs=rngs)
        logits = self.fc(x)
        training = not self.dropout.deterministic
        if training and self.aux1 is not None and self.aux2 is not None:
            return logits, self.aux1(x4a, rngs=rngs), self.aux2(x4d, rngs=rngs)
        return logits


def _pool(x: jax.Array) -> jax.Array:
    return max_pool(x, 3, stride=1, padding=1)


def _chain(layers: Iterable[Callable[[jax.Array], jax.Array]], x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x


def _window_means(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Averages `count` windows that cover an axis evenly: PyTorch's adaptive average pooling."""
    size = x.shape[axis]
    windows = [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]
    means = [jax.lax.slice_in_dim(x, start, end, axis=axis).mean(axis) for start, end in windows]
    return jnp.stack(means, axis)
