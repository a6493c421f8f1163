"""Reads and writes PyTorch's weights for the networks of `common.models`.

Parameter names agree but for their last part. A `.pth` or `.pt` file is a pickle, and unpickling
can run code: prefer `.safetensors`. Pickles are read by torch's restricted unpickler
(`weights_only=True`), which accepts only tensors and plain containers. Nothing else needs torch.
"""

import importlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from common.models import GoogLeNet, Network, split_model

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
        missing, unexpected, of another shape, not floating or not finite.
    """
    path = Path(path)
    trees = split_model(model)[1:]
    shapes = {
        torch_name(p): _torch_shape(leaf.shape) for tree in trees for p, leaf in _leaves(tree)
    }
    found = {
        name: value
        for name, value in _renamed(_read(path), shapes).items()
        if not _is_ignored(name, value, shapes, model)
    }
    if problems := "\n  ".join(_problems(found, shapes)):
        raise ValueError(f"{path} does not fit this {type(model).__name__}:\n  {problems}")

    def convert(keys: Any, leaf: Any) -> jax.Array:
        path = _path(keys)
        array = _from_torch(found[torch_name(path)], leaf.shape, model.flattened.get(path))
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


def _renamed(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Gives arrays our names where a network has one by such a name and the file has none."""

    def own(name: str) -> str:
        other = _OTHER_NAMES.get(name, name)
        return other if other in shapes and other not in arrays else name

    return {own(name): value for name, value in arrays.items()}


def _is_ignored(
    name: str, value: np.ndarray, shapes: Mapping[str, tuple[int, ...]], model: Network
) -> bool:
    prefix, _, last = name.rpartition(".")
    headless = isinstance(model, GoogLeNet) and not model.auxiliary_heads
    return (
        last == "num_batches_tracked"
        or (last == "scale" and value.size == 1 and f"{prefix}.weight" in shapes)
        or (headless and name.startswith(("aux1.", "aux2.")))
    )


def _problems(
    found: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Describes why a state dict does not fit, one line per name."""
    for name, shape in shapes.items():
        value = found.get(name)
        if value is None:
            yield f"missing: {name}, shape {shape}"
        elif value.shape != shape:
            yield f"other shape: {name}, found {value.shape}, expected {shape}"
        elif value.dtype != np.float32:
            yield f"not floating: {name}, found {value.dtype}"
        elif not np.isfinite(value).all():
            yield f"not finite: {name}, {np.sum(~np.isfinite(value))} of {value.size} values"
    for name in sorted(found.keys() - shapes.keys()):
        yield f"unexpected: {name}, shape {found[name].shape}"


def _read(path: Path) -> dict[str, np.ndarray]:
    """Reads a file's arrays by name, floating ones as float32."""
    if not path.is_file():
        raise FileNotFoundError(
            f"no weight file at {path}: download one, for instance from "
            "https://docs.pytorch.org/vision/stable/models.html, and give its path"
        )
    arrays = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): value for name, value in arrays.items()}
    return arrays


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = _import("safetensors.numpy", path)
    try:
        arrays = safetensors.load_file(path)
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error
    for name, value in arrays.items():
        if jnp.issubdtype(value.dtype, jnp.floating):
            arrays[name] = value.astype(np.float32, copy=False)
    return arrays


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    torch = _import("torch", path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, or is damaged, or holds more than tensors in "
            "plain containers: then save `model.state_dict()` instead"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict but a {type(content).__name__}")
    wrapped = (content[key] for key in _WRAPPERS if isinstance(content.get(key), dict))
    content = next(wrapped, content)
    others = [
        str(name)
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise ValueError(f"{path} holds no state dict: these are not tensors: {', '.join(others)}")
    tensors = {name: value.detach() for name, value in content.items()}
    return {
        name: (value.float() if value.is_floating_point() else value).numpy()
        for name, value in tensors.items()
    }


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"reading {path.name} needs {package}: pip install {package}") from error
