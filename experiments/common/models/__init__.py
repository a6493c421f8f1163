"""Flax NNX networks; images are NHWC, tokens (n, length).

The attribute `constrained` of each is a pattern matching the paths of the kernels to constrain, for
`cbp_jax.select(include=...)`. `flattened` has the height, width and channels of the image that a
dense kernel sees flattened, by the kernel's path: PyTorch flattens channels first.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.models.alexnet import AlexNet
from common.models.googlenet import GoogLeNet
from common.models.llama import Llama
from common.models.resnet import ResNet, cifar_resnet18, resnet18, resnet20, resnet50
from common.models.small import SmallConvNet, SmallMLP

PyTree = Any
Network = AlexNet | GoogLeNet | Llama | ResNet | SmallConvNet | SmallMLP

NETWORKS: Mapping[str, Callable[..., Network]] = MappingProxyType(
    {
        "alexnet": AlexNet,
        "resnet18": resnet18,
        "resnet50": resnet50,
        "googlenet": GoogLeNet,
        "resnet20": resnet20,
        "cifar_resnet18": cifar_resnet18,
        "small_conv": SmallConvNet,
        "small_mlp": SmallMLP,
        "llama": Llama,
    }
)

__all__ = [
    "NETWORKS",
    "AlexNet",
    "GoogLeNet",
    "Llama",
    "Network",
    "ResNet",
    "SmallConvNet",
    "SmallMLP",
    "cifar_resnet18",
    "create",
    "resnet18",
    "resnet20",
    "resnet50",
    "split_model",
]


def create(
    name: str,
    num_classes: int | None = None,
    *,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
    **options: Any,
) -> Network:
    """Creates a network by name, with fresh weights.

    Args:
      name: a key of `NETWORKS`.
      num_classes: number of logits; None: the network's own, 1000 for ImageNet,
        256 for text and 10 otherwise.
      dtype: of the computation; parameters, statistics and logits are float32.
      rngs: where the weights come from.
      **options: further arguments of the network, such as `channels` of small_conv.

    Returns:
      The network, in training mode.

    Raises:
      ValueError: if there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"no network named {name!r}; there are {', '.join(NETWORKS)}")
    if num_classes is not None:
        options["num_classes"] = num_classes
    return NETWORKS[name](dtype=dtype, rngs=rngs, **options)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """Splits a module into its static part, its parameters and its batch statistics."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)
