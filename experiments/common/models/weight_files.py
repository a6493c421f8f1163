"""Opens files of weights that strangers made; nothing of an array is read before it is asked for.

A `.pth` file is a pickle. torch's restricted unpickler runs no code of it, but would inflate
archives, make byte arrays of any length and end the process over tuples nested deep enough: such
files are refused before. `.safetensors` files hold arrays alone.
"""

import importlib
import io
import mmap
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FLOATS = ("float32", "float64", "float16", "bfloat16")  # what is converted to float32

_SAFETENSORS_NAMES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_DEEPEST = 100  # of a pickle's containers; those of a state dict are some ten deep
_ZIP = b"PK\x03\x04"  # how torch tells its two forms apart
_OLD_PICKLES = 5  # of the older one: a number, a version, the system, the objects, the arrays' keys


class StoredArray(NamedTuple):
    """An array of a file, which is still there."""

    shape: tuple[int, ...]
    dtype: str  # one of FLOATS if the array is dense and can be read
    read: Callable[[], np.ndarray]  # as float32


def open_weights(path: Path) -> dict[str, StoredArray]:
    """Opens a file of weights.

    Args:
      path: a `.safetensors` file, or one that `torch.load` reads.

    Returns:
      Its arrays by name.

    Raises:
      FileNotFoundError: if there is no such file.
      ImportError: if the package that reads it is not installed.
      ValueError: if it is damaged, or holds no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no weight file at {path}: download one, for instance from "
            "https://docs.pytorch.org/vision/stable/models.html, and give its path"
        )
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def _open_safetensors(path: Path) -> dict[str, StoredArray]:
    safetensors = _import("safetensors", path)
    try:
        file = safetensors.safe_open(path, framework="np", backend="pread")
        return {name: _of_safetensors(file, name) for name in file.keys()}  # noqa: SIM118, no dict
    except Exception as error:
        raise ValueError(f"{path} is not a safetensors file, or is damaged: {error}") from error


def _of_safetensors(file: Any, name: str) -> StoredArray:
    about = file.get_slice(name)
    dtype = about.get_dtype()
    return StoredArray(
        tuple(about.get_shape()),
        _SAFETENSORS_NAMES.get(dtype, dtype),
        lambda: file.get_tensor(name).astype(np.float32, copy=False),
    )


def _open_pickle(path: Path) -> dict[str, StoredArray]:
    torch = _import("torch", path)
    try:
        _check_pickle(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged pickles raise anything
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, or is damaged, or holds more than tensors in "
            "plain containers: then save `model.state_dict()` instead"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no state dict but a {type(content).__name__}")
    # Methods of the classes, as a pickle may give its objects attributes of the same names.
    items = dict(dict.items(content))
    wrapped = (items[key] for key in _WRAPPERS if isinstance(items.get(key), dict))
    items = dict(dict.items(next(wrapped, items)))
    others = [
        str(name)
        for name, value in items.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise ValueError(f"{path} holds no state dict: these are not tensors: {', '.join(others)}")
    return {name: _of_torch(torch.Tensor.detach(value)) for name, value in items.items()}


def _of_torch(value: Any) -> StoredArray:
    dtype = str(value.dtype).removeprefix("torch.")
    if value.is_nested:  # and has no shape
        return StoredArray((), f"nested {dtype}", value.float)
    kind = "meta" if value.is_meta else str(value.layout).removeprefix("torch.")
    return StoredArray(
        tuple(value.shape),
        dtype if kind == "strided" else f"{kind} {dtype}",
        lambda: value.float().resolve_neg().numpy(),
    )


def _check_pickle(path: Path) -> None:
    """Raises ValueError if torch would take more memory than the file is long, or end the process.

    The file is a zip archive of a pickle and of arrays; in the older form, pickles, then arrays.
    """
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray\n") >= 0:  # of what torch calls, this alone fills memory
            raise ValueError("it holds a bytearray")
        if content[: len(_ZIP)] != _ZIP:
            for _ in range(_OLD_PICKLES):
                _check_depth(content)
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError("its archive is compressed, or has the same bytes in two files")
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                _check_depth(io.BytesIO(archive.read(entry)))


def _check_depth(file: Any) -> None:
    """Raises ValueError if a pickle nests tuples so deep that Python overflows its stack."""
    stack: list[int] = []  # the depth of each object
    marks: list[int] = []  # where on the stack
    memo: dict[Any, int] = {}
    for opcode, argument, _ in pickletools.genops(file):
        name, before, after = opcode.name, opcode.stack_before, opcode.stack_after
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        else:
            slices = pickletools.markobject in before
            count = before.index(pickletools.markobject) if slices else len(before)
            start = (marks.pop() if slices else len(stack)) - count
            popped = stack[start:]
            del stack[start:]
            if name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
                depth = max(popped[0], 1 + max(popped[1:], default=0))
            else:
                depth = 1 + max(popped, default=0)
            if depth > _DEEPEST:
                raise ValueError(f"its pickle is more than {_DEEPEST} deep")
            stack.extend([depth] * len(after))


def _import(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"reading {path.name} needs {package}: pip install {package}") from error
