"""Packed weights in a file.

The file is a safetensors container; all numbers are little-endian. It consists of:

    8 bytes   n, the length of the header, an unsigned integer
    n bytes   the header, JSON in UTF-8, padded with spaces
    the rest  the bytes of the tensors, without gaps

The header is an object with one entry per tensor,
`"NAME": {"dtype": "U8", "shape": [...], "data_offsets": [begin, end]}`, whose offsets count from
the end of the header, and `"__metadata__"`, an object of strings:

    "format"         "cbp_jax packed weights"
    "version"        "1"
    "tensors"        JSON: an object with one entry per tensor of the network, in its order
    "tensors_crc32"  CRC-32 of the bytes of the string "tensors", eight hexadecimal digits

The entry of an unconstrained tensor is `{"shape": [...], "dtype": "float32", "crc32": "..."}`, and
its bytes are the container's tensor NAME. The entry of a constrained tensor is

    {"constraint": "ternary",    its name, for people
     "levels": [-1.0, 0.0, 1.0], increasing, in units of the scale
     "bits": 2,                  per code
     "shape": [3, 3, 64, 128],   of the weights, in C order: the last axis is contiguous
     "dtype": "float32",         of the weights
     "scale_axis": [3],          axes along which the scale differs; [] for one scale
     "crc32": "89abcdef"}        of the bytes of the codes followed by those of the scales

and its bytes are two tensors of the container: `NAME.codes`, U8, of `ceil(size * bits / 8)` bytes,
and `NAME.scale`, F32 (F64 for float64 weights), of shape [] or the shape of the weights with 1
along the axes that share a scale. Code `i`, for weight `i` in C order, is bits `i * bits` to
`(i + 1) * bits - 1` of the codes, counted from the least significant bit of the first byte; bits
after the last code are 0. In C, for at most 9 bits:

    size_t bit = i * bits, byte = bit / 8;
    unsigned two = codes[byte] | (bit % 8 + bits > 8 ? codes[byte + 1] << 8 : 0);
    float weight = levels[two >> (bit % 8) & ((1u << bits) - 1)] * scale[channel];

NAME is the path of the tensor, its keys joined by "/". In a key "~" is written "~0" and "/" is
written "~1"; an empty key is "~2". CRC-32 is that of zlib, PNG and Ethernet.

Reference: the container is described at https://github.com/huggingface/safetensors.
"""

import json
import math
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from cbp_jax.constraints import Constraint
from cbp_jax.deploy.files import replacing
from cbp_jax.deploy.packed import (
    Packed,
    PackedError,
    PackedTensor,
    check_equal,
    check_packed,
    check_tensor,
)

_FORMAT, _VERSION = "cbp_jax packed weights", "1"
_LONGEST_HEADER = 100_000_000  # the limit of safetensors
_DEEPEST = 100  # keys of a path: nested dictionaries are handled by recursion
_MOST_AXES = 64  # as in numpy
_LONGEST = 2**31 - 1  # elements of an empty tensor, were its axes of 0 of length 1
_CHUNK = 1 << 20  # codes are checked in chunks of this many bytes times the bits per code


def save_packed(path: str | os.PathLike[str], packed: Packed) -> None:
    """Saves packed weights to a file, atomically: a crash leaves an existing file unchanged.

    The same weights give the same bytes.

    `cbp_jax/deploy/packed_file.py` describes the format byte by byte.

    Args:
      path: the file to write; ".safetensors" is the usual extension.
      packed: the result of `pack`.

    Raises:
      ValueError: if safetensors does not support the dtype of an array, two tensors would have the
        same name in the file, a path has more than 100 keys, or (`PackedError`) parts of a packed
        tensor do not fit each other.
      TypeError: if `packed` is not a `Packed`, or one that holds something else.
      OSError: if the file cannot be written, as into a folder that does not exist or a full disk.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.5, 0.5, 0.5]])}
      >>> packed = cbp_jax.pack(params, cbp_jax.cbp(constraint="binary").init(params))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = os.path.join(folder, "weights.safetensors")
      ...     cbp_jax.save_packed(path, packed)
      ...     cbp_jax.load_packed(path) == packed
      True
    """
    check_packed(packed, "save_packed")
    arrays: dict[str, np.ndarray] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, tensor in packed.tensors.items():
        if name.count("/") >= _DEEPEST:
            raise ValueError(f"{name[:40]!r}... is a path of over {_DEEPEST} keys: shorten it")
        for inner, array in _stored_arrays(name, tensor).items():
            if inner in arrays or inner == "__metadata__":
                raise ValueError(
                    f"the file already has a tensor {inner!r}: rename the parameter {name!r}"
                )
            # The reshape takes away the axis that ascontiguousarray gives a scalar.
            arrays[inner] = np.ascontiguousarray(array).reshape(array.shape)
        entries[name] = _tensor_entry(name, tensor)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False)
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "tensors": text,
        "tensors_crc32": _hex_crc(zlib.crc32(text.encode())),
    }
    specs = {name: _tensor_spec(name, array) for name, array in arrays.items()}
    with replacing(Path(path)) as new:
        try:
            safetensors.serialize_file(specs, new, metadata=metadata)
        except safetensors.SafetensorError as error:  # of the system: a full disk, say
            raise OSError(f"cannot write {path}: {error}") from error
        _order_metadata(new)


def load_packed(path: str | os.PathLike[str]) -> Packed:
    """Loads packed weights from a file, and checks every byte of it.

    Memory use peaks at the packed weights plus one tensor; nothing is unpacked.

    Args:
      path: a file that `save_packed` wrote.

    Returns:
      The packed weights as numpy arrays, equal to those that were saved.

    Raises:
      PackedError: if the file is damaged, truncated, followed by other bytes, of another version or
        in another format. It names the tensor unless the damage is in the header.
      OSError: if the file does not exist or cannot be read.

    Example:
      See `save_packed`.

      >>> import cbp_jax
      >>> cbp_jax.load_packed("no_such_file.safetensors")
      Traceback (most recent call last):
          ...
      FileNotFoundError: no file at no_such_file.safetensors
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    try:
        # Mapping the file would count its memory twice.
        with safetensors.safe_open(path, framework="np", backend="pread") as file:
            return _read_tensors(path, file)
    except safetensors.SafetensorError as error:
        raise PackedError(f"{path} is damaged: {_describe_truncation(path) or error}") from error


def _order_metadata(path: Path) -> None:
    """Gives the metadata an order, which in safetensors differs from call to call."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def _read_tensors(path: Path, file: Any) -> Packed:
    metadata = file.metadata() or {}
    if metadata.get("format") != _FORMAT:
        raise PackedError(
            f"{path} holds no packed weights: it is a safetensors file, but not from save_packed"
        )
    if metadata.get("version") != _VERSION:
        raise PackedError(
            f"{path} is of format version {metadata.get('version')!r}, and this cbp_jax reads "
            f"version {_VERSION!r}"
        )
    text = metadata.get("tensors", "")
    if metadata.get("tensors_crc32") != _hex_crc(zlib.crc32(text.encode())):
        raise PackedError(
            f"{path} is damaged: the description of its tensors, in the header, has changed"
        )
    try:
        entries = dict(json.loads(text))
    except (ValueError, TypeError, RecursionError) as error:
        raise PackedError(
            f"{path} is damaged: the description of its tensors is not a JSON object ({error})"
        ) from error
    left = set(file.keys())
    tensors: dict[str, Any] = {}
    for name, entry in entries.items():
        if not isinstance(entry, dict):
            raise PackedError(f"{path} is damaged: tensor {name!r} is described by {entry!r}")
        if name.count("/") >= _DEEPEST:
            start = f"{name[:40]!r}..."
            raise PackedError(f"{path}: tensor {start} has a path of over {_DEEPEST} keys")
        expected = {f"{name}.codes", f"{name}.scale"} if "constraint" in entry else {name}
        if not expected <= left:
            raise PackedError(f"{path} is damaged: tensor {name!r} is missing")
        left -= expected
        try:
            tensors[name] = _read_tensor(file, name, entry)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise PackedError(f"{path} is damaged: tensor {name!r}: {error}") from error
    if left:
        raise PackedError(f"{path} is damaged: its tensor {min(left)!r} is not described")
    return Packed(tensors)


def _read_tensor(file: Any, name: str, entry: Mapping[str, Any]) -> Any:
    """Reads and checks a tensor; raises a built-in error describing a mismatch."""
    shape, dtype = tuple(entry["shape"]), jnp.dtype(entry["dtype"])
    if not all(type(n) is int and n >= 0 for n in shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"{shape[: _MOST_AXES + 1]} is not a shape")
    # Those with weights are as long as their codes, which are checked below; no array is as long as
    # an empty one may claim to be.
    if math.prod(max(n, 1) for n in shape) > _LONGEST and 0 in shape:
        raise ValueError(f"{shape} is no shape of an empty tensor")
    if "constraint" not in entry:
        array = file.get_tensor(name)
        check_equal("shape", array.shape, shape)
        check_equal("dtype", array.dtype, dtype)
        check_equal("check sum", _hex_crc(_crc(array)), entry["crc32"])
        return array
    constraint = Constraint(entry["constraint"], tuple(entry["levels"]))
    codes, scale = file.get_tensor(f"{name}.codes"), file.get_tensor(f"{name}.scale")
    tensor = PackedTensor(codes, scale, constraint, shape, dtype.name)
    check_equal("bits", entry["bits"], constraint.bits)
    check_tensor(tensor)
    check_equal("scale_axis", _scale_axis(scale), entry["scale_axis"])
    check_equal("check sum", _hex_crc(_crc(codes, scale)), entry["crc32"])
    _check_codes(codes, constraint, tensor.size)
    return tensor


def _check_codes(codes: np.ndarray, constraint: Constraint, size: int) -> None:
    """Raises ValueError if a code has no level, or if there are bits after the last code."""
    bits, levels = constraint.bits, len(constraint.levels)
    if size * bits % 8 and codes[-1] >> (size * bits % 8):
        raise ValueError("there are bits after its last code")
    if levels == 2**bits:
        return
    for start in range(0, codes.size, _CHUNK * bits):  # whole groups of eight codes
        string = np.unpackbits(codes[start : start + _CHUNK * bits], bitorder="little")
        table = string[: string.size // bits * bits].reshape(-1, bits).astype(np.uint32)
        if np.any(table @ (1 << np.arange(bits, dtype=np.uint32)) >= levels):
            raise ValueError(f"some of its codes are beyond its {levels} levels")


def _stored_arrays(name: str, tensor: Any) -> dict[str, np.ndarray]:
    if not isinstance(tensor, PackedTensor):
        return {name: np.asarray(tensor)}
    codes, scale = np.asarray(tensor.codes), np.asarray(tensor.scale)
    return {f"{name}.codes": codes, f"{name}.scale": scale}


def _tensor_entry(name: str, tensor: Any) -> dict[str, Any]:
    arrays = list(_stored_arrays(name, tensor).values())
    crc32 = _hex_crc(_crc(*arrays))
    entry = {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "crc32": crc32}
    if not isinstance(tensor, PackedTensor):
        return entry
    rule = tensor.constraint
    levels = {"constraint": rule.name, "levels": list(rule.levels), "bits": rule.bits}
    return levels | entry | {"scale_axis": _scale_axis(arrays[1])}


def _scale_axis(scale: np.ndarray) -> list[int]:
    return [axis for axis, n in enumerate(scale.shape) if n != 1]


def _crc(*arrays: np.ndarray) -> int:
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, crc)
    return crc


def _hex_crc(crc: int) -> str:
    return f"{crc:08x}"


def _tensor_spec(name: str, array: np.ndarray) -> safetensors.TensorSpec:
    try:
        return safetensors.TensorSpec(
            dtype=array.dtype.name,
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{name!r} is {array.dtype}, which a safetensors file cannot hold: convert it first"
        ) from error


def _describe_truncation(path: Path) -> str:
    """Describes truncation or trailing bytes; returns "" if the header is broken."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        available = path.stat().st_size - 8 - length
        try:
            readable = 0 < length <= min(available + length, _LONGEST_HEADER)
            header = json.loads(file.read(length)) if readable else {}
            ends = sorted(
                (entry["data_offsets"][1], name)
                for name, entry in header.items()
                if name != "__metadata__"
            )
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return ""
    if ends and ends[-1][0] < available:
        return f"{available - ends[-1][0]} bytes follow its last tensor, {ends[-1][1]!r}"
    truncated = (name for end, name in ends if end > available)
    return next((f"it is truncated in tensor {name!r}" for name in truncated), "")
