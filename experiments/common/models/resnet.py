"""Residual networks (He et al. 2016): torchvision's ResNet-18 and ResNet-50, and two for CIFAR."""

from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.models.layers import batch_norm, conv, head, max_pool


class _Block(nnx.Module):
    """The shortcut, which both kinds of block share."""

    expansion: ClassVar[int]

    def __init__(
        self,
        features_in: int,
        width: int,
        stride: int,
        projections: bool,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.stride, self.features = stride, width * self.expansion
        layers: nnx.List | None = None
        if projections and (stride != 1 or features_in != self.features):
            project = conv(features_in, self.features, 1, stride, dtype=dtype, rngs=rngs)
            layers = nnx.List([project, batch_norm(self.features, dtype=dtype, rngs=rngs)])
        self.downsample = layers

    def shortcut(self, x: jax.Array) -> jax.Array:
        """Brings the input to the shape of the output."""
        if self.downsample is not None:
            project, norm = self.downsample
            return norm(project(x))
        missing = self.features - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))


class BasicBlock(_Block):
    """Two 3x3 convolutions; the first has the stride."""

    expansion = 1

    def __init__(
        self,
        features_in: int,
        width: int,
        stride: int = 1,
        projections: bool = True,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv(features_in, width, 3, stride, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(width, dtype=dtype, rngs=rngs)
        self.conv2 = conv(width, width, 3, dtype=dtype, rngs=rngs)
        self.bn2 = batch_norm(width, dtype=dtype, rngs=rngs)
        super().__init__(features_in, width, stride, projections, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return nnx.relu(y + self.shortcut(x))


class Bottleneck(_Block):
    """Convolutions of 1x1, 3x3, which has the stride (version 1.5), and 1x1, four times as wide."""

    expansion = 4

    def __init__(
        self,
        features_in: int,
        width: int,
        stride: int = 1,
        projections: bool = True,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv(features_in, width, 1, dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(width, dtype=dtype, rngs=rngs)
        self.conv2 = conv(width, width, 3, stride, dtype=dtype, rngs=rngs)
        self.bn2 = batch_norm(width, dtype=dtype, rngs=rngs)
        self.conv3 = conv(width, width * self.expansion, 1, dtype=dtype, rngs=rngs)
        self.bn3 = batch_norm(width * self.expansion, dtype=dtype, rngs=rngs)
        super().__init__(features_in, width, stride, projections, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    """Stages of residual blocks; each but the first halves the image and doubles the channels.

    Args:
      num_classes: number of logits.
      block: BasicBlock or Bottleneck.
      depths: number of blocks of each stage.
      width: channels of the first stage, before the block's expansion.
      small_images: a 3x3 stem that keeps the size, for images of 32x32; otherwise 7x7 of stride 2
        and max pooling.
      projections: whether a shortcut that changes shape is a 1x1 convolution with batch
        normalization (option B of He et al.); otherwise it has no parameters (option A): every
        other pixel, and channels of zeros, half of them before and half after.
      dtype: of the computation; parameters, statistics and logits are float32.
      rngs: where the weights come from.
    """

    constrained = "layer[1-9]/.*/kernel"
    flattened: ClassVar[dict[str, tuple[int, int, int]]] = {}

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        width: int = 64,
        small_images: bool = False,
        projections: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.small_images, self.num_stages = small_images, len(depths)
        self.conv1 = conv(3, width, *((3, 1) if small_images else (7, 2)), dtype=dtype, rngs=rngs)
        self.bn1 = batch_norm(width, dtype=dtype, rngs=rngs)
        features = width
        for stage, depth in enumerate(depths):
            blocks, channels = [], width << stage
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                layer = block(features, channels, stride, projections, dtype=dtype, rngs=rngs)
                blocks.append(layer)
                features = channels * block.expansion
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = head(features, num_classes, rngs=rngs)

    def __call__(self, images: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 logits (n, num_classes) for images (n, h, w, 3); ignores `rngs`."""
        del rngs
        x = nnx.relu(self.bn1(self.conv1(images)))
        if not self.small_images:
            x = max_pool(x, 3, stride=2, padding=1)
        for stage in range(self.num_stages):
            for block in getattr(self, f"layer{stage + 1}"):
                x = block(x)
        return self.fc(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))


def resnet18(num_classes: int = 1000, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> ResNet:
    """ResNet-18 for images of 224x224."""
    return ResNet(num_classes, block=BasicBlock, depths=(2, 2, 2, 2), dtype=dtype, rngs=rngs)


def resnet50(num_classes: int = 1000, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> ResNet:
    """ResNet-50, version 1.5, for images of 224x224."""
    return ResNet(num_classes, block=Bottleneck, depths=(3, 4, 6, 3), dtype=dtype, rngs=rngs)


def resnet20(
    num_classes: int = 10, *, depth: int = 3, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> ResNet:
    """ResNet-20 (He et al., section 4.2) for images of 32x32; shortcuts have no parameters.

    Other depths are blocks per stage: `depth=1` is ResNet-8, small enough for tests.
    """
    return ResNet(
        num_classes,
        block=BasicBlock,
        depths=(depth, depth, depth),
        width=16,
        small_images=True,
        projections=False,
        dtype=dtype,
        rngs=rngs,
    )


def cifar_resnet18(
    num_classes: int = 10, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> ResNet:
    """ResNet-18 with a stem for images of 32x32."""
    return ResNet(
        num_classes,
        block=BasicBlock,
        depths=(2, 2, 2, 2),
        small_images=True,
        dtype=dtype,
        rngs=rngs,
    )
