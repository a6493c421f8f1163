"""Reads and writes PyTorch's weights for the networks of `common.models`.

Parameter names agree but for their last part. A `.pth` or `.pt` file is a pickle, and unpickling
can run code: prefer `.safetensors`. Pickles are read by torch's restricted unpickler
(`weights_only=True`), which accepts only tensors and plain containers. Nothing else needs torch.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.models import GoogLeNet, Network, split_model
from common.models.weight_files import FLOATS, StoredArray, open_weights

PyTree = Any

# Options with which `models.create` makes the network that torchvision's weights are for.
TORCHVISION_OPTIONS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"googlenet": {"transform_input": True}}
)

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Names that others' CIFAR ResNets have (akamaster/pytorch_resnet_cifar10), and torchvision's.
_OTHER_NAMES = {"linear.weight": "fc.weight", "linear.bias": "fc.bias"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_torch(path: str | os.PathLike[str], model: Network) -> tuple[PyTree, PyTree]:
    """Reads all of a network's weights and batch statistics from a PyTorch file.

    The state dict may be wrapped in a dictionary, under "state_dict", "model_state_dict" or
    "model", and its names may all start with "module.", as DistributedDataParallel's do. Ignored
    are `num_batches_tracked`; the one-element `scale` beside a weight in the authors' quantized
    layers (`cbp` measures it again); and GoogLeNet's auxiliary heads if `model` has none.
    torchvision's GoogLeNet expects `transform_input=True`, see `TORCHVISION_OPTIONS`. In ResNets
    for CIFAR the last layer may be named `linear` instead of `fc`, as by
    akamaster/pytorch_resnet_cifar10: option A, as our `resnet20`, whose `depth=9` is ResNet-56, and
    trained on images normalised with ImageNet's mean and deviation.

    Args:
      path: a `.safetensors` file, or one that `torch.load` reads.
      model: the network, unchanged; only names and shapes count, so `nnx.eval_shape` suffices.

    Returns:
      params and batch_stats, structured as by `models.split_model(model)`, in float32.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package that reads it is not installed.
      ValueError: if it is not a checkpoint, or not of this network; lists every name that is
        missing, unexpected, of another shape or dtype, or not finite. Shapes are compared before
        an array is read; dtypes are float32, float64, float16 and bfloat16, of dense tensors.
    """
    path = Path(path)
    trees = split_model(model)[1:]
    shapes = {
        torch_name(p): _torch_shape(leaf.shape) for tree in trees for p, leaf in _leaves(tree)
    }
    found = {
        name: stored
        for name, stored in _renamed(_unwrapped(open_weights(path)), shapes).items()
        if not _is_ignored(name, stored, shapes, model)
    }
    values = {
        name: found[name].read()
        for name, shape in shapes.items()
        if name in found and found[name].shape == shape and found[name].dtype in FLOATS
    }
    if problems := "\n  ".join(_problems(found, shapes, values)):
        raise ValueError(f"{path} does not fit this {type(model).__name__}:\n  {problems}")

    def convert(keys: Any, leaf: Any) -> jax.Array:
        path = _path(keys)
        array = _from_torch(values[torch_name(path)], leaf.shape, model.flattened.get(path))
        return jnp.array(array)  # in training mode Flax would write into numpy's

    params, batch_stats = (jax.tree_util.tree_map_with_path(convert, tree) for tree in trees)
    return params, batch_stats


def to_torch(model: Network, params: PyTree, batch_stats: PyTree) -> dict[str, np.ndarray]:
    """Inverts `load_torch`: arrays by PyTorch's names, for `load_state_dict` or safetensors."""
    return {
        torch_name(path): _to_torch(np.asarray(leaf), model.flattened.get(path))
        for tree in (params, batch_stats)
        for path, leaf in _leaves(tree)
    }


def torch_name(path: str) -> str:
    """Returns PyTorch's name: layer1.0.conv1.weight for layer1/0/conv1/kernel."""
    *modules, leaf = path.split("/")
    return ".".join([*modules, _TORCH_NAMES.get(leaf, leaf)])


def _leaves(tree: PyTree) -> list[tuple[str, Any]]:
    return [(_path(keys), leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]]


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """HWIO becomes OIHW; dense kernels are transposed."""
    return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]


def _from_torch(
    value: np.ndarray, shape: tuple[int, ...], image: tuple[int, int, int] | None
) -> np.ndarray:
    """Reorders axes; a dense kernel on a flattened image is a convolution as large as the image."""
    if image:
        height, width, channels = image
        value = value.reshape(-1, channels, height, width)
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return value.reshape(shape)


def _to_torch(value: np.ndarray, image: tuple[int, int, int] | None) -> np.ndarray:
    shape = _torch_shape(value.shape)
    if image:
        value = value.reshape(*image, -1)
    value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    # A copy: safetensors would write the memory of a view as it lies.
    return np.array(value.reshape(shape), order="C")


def _unwrapped(arrays: dict[str, StoredArray]) -> dict[str, StoredArray]:
    """Takes the prefix of DistributedDataParallel off all names, if all have it."""
    if all(name.startswith("module.") for name in arrays):
        return {name.removeprefix("module."): stored for name, stored in arrays.items()}
    return arrays


def _renamed(
    arrays: Mapping[str, StoredArray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredArray]:
    """Gives arrays our names where a network has one by such a name and the file has none."""

    def own(name: str) -> str:
        other = _OTHER_NAMES.get(name, name)
        return other if other in shapes and other not in arrays else name

    return {own(name): stored for name, stored in arrays.items()}


def _is_ignored(
    name: str, stored: StoredArray, shapes: Mapping[str, tuple[int, ...]], model: Network
) -> bool:
    prefix, _, last = name.rpartition(".")
    headless = isinstance(model, GoogLeNet) and not model.auxiliary_heads
    return (
        last == "num_batches_tracked"
        or (last == "scale" and math.prod(stored.shape) == 1 and f"{prefix}.weight" in shapes)
        or (headless and name.startswith(("aux1.", "aux2.")))
    )


def _problems(
    found: Mapping[str, StoredArray],
    shapes: Mapping[str, tuple[int, ...]],
    values: Mapping[str, np.ndarray],
) -> Iterator[str]:
    """Describes why a state dict does not fit, one line per name."""
    for name, shape in shapes.items():
        stored = found.get(name)
        if stored is None:
            yield f"missing: {name}, shape {shape}"
        elif stored.shape != shape:
            yield f"other shape: {name}, found {stored.shape}, expected {shape}"
        elif name not in values:
            yield f"other dtype: {name}, found {stored.dtype}, expected one of {', '.join(FLOATS)}"
        elif unfit := int(np.sum(~np.isfinite(values[name]))):
            yield f"not finite: {name}, {unfit} of {values[name].size} values"
    for name in sorted(found.keys() - shapes.keys()):
        yield f"unexpected: {name}, shape {found[name].shape}"
