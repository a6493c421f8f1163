"""The metadata of a GGUF file: Python's values as the types that llama.cpp reads.

Python          GGUF
bool            BOOL
int             UINT32; where that is too small INT32, UINT64 or INT64; in a list INT32 first
float           FLOAT32
str, bytes      STRING
list of these   ARRAY
"""

import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cbp_jax.arguments import shown

if TYPE_CHECKING:  # an optional dependency
    import gguf

ARCHITECTURE = "general.architecture"
_QUANTIZATION = {"general.quantization_version": 2}  # of the blocks; files that have some need it
_ALIGNMENT = "general.alignment"
_LONGEST_KEY = 65535
_INTEGERS = ("UINT32", "INT32", "UINT64", "INT64")


class Typed(NamedTuple):
    """A value, its type in GGUF, and that of its elements if it is an array."""

    value: Any
    kind: str
    element: str | None


def typed_metadata(metadata: Any) -> dict[str, Typed]:
    """Checks the metadata, and returns them with their types.

    Raises:
      ValueError: if there is no architecture; or a value or a key is none of GGUF.
      TypeError: if the metadata are no mapping.
    """
    if not isinstance(metadata, Mapping):
        raise TypeError(f"metadata is a mapping of GGUF keys to values, got {shown(metadata)}")
    architecture = metadata.get(ARCHITECTURE)
    if not isinstance(architecture, str) or not architecture:
        raise ValueError(
            f"metadata needs {ARCHITECTURE!r}, such as 'llama', which tells llama.cpp what the "
            f"other keys and the tensors are; got {shown(architecture)}"
        )
    return {key: _typed_value(key, value) for key, value in {**_QUANTIZATION, **metadata}.items()}


def add_metadata(writer: "gguf.GGUFWriter", metadata: Mapping[str, Typed]) -> None:
    """Adds all keys but the architecture, which the writer has been given."""
    from gguf import GGUFValueType

    for key, (value, kind, element) in metadata.items():
        if key != ARCHITECTURE:
            of = None if element is None else GGUFValueType[element]
            writer.add_key_value(key, value, GGUFValueType[kind], of)


def check_metadata(reader: "gguf.GGUFReader", metadata: Mapping[str, Typed]) -> None:
    """Raises ValueError if a file's metadata are others."""
    for key, (value, kind, element) in metadata.items():
        field = reader.fields.get(key)
        types = [kind] if element is None else [kind, element]
        if field is None or [found.name for found in field.types] != types:
            raise ValueError(f"metadata: {key!r} does not read back as {' of '.join(types)}")
        text, values = types[-1] == "STRING", value if element is not None else [value]
        parts = (field.parts[i] for i in field.data)
        read = [part.tobytes() if text else part.tolist()[0] for part in parts]
        wanted = [_as_bytes(v) for v in values] if text else _as_stored(values, types[-1])
        if read != wanted:
            raise ValueError(f"metadata: {key!r} reads back as {shown(read)}")


def _typed_value(key: Any, value: Any) -> Typed:
    if not isinstance(key, str) or not 0 < len(key.encode()) <= _LONGEST_KEY:
        raise ValueError(
            f"metadata: {shown(key)} is no key of GGUF, which is text such as 'llama.block_count'"
        )
    if key == _ALIGNMENT:
        raise ValueError(f"metadata: {key!r} is not yours to choose: leave it out")
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    if isinstance(value, list | tuple):
        values = [_plain(item) for item in value]
        kind = _common_type(values, ("INT32", *_INTEGERS))
        if kind is not None:
            return Typed(values, "ARRAY", kind)
    elif (kind := _common_type([_plain(value)], _INTEGERS)) is not None:
        return Typed(_plain(value), kind, None)
    raise ValueError(
        f"metadata: the value of {key!r} must be a bool, an integer of up to 64 bits, a finite "
        "float32 number, text, bytes, or a list of one kind of them, not empty; got "
        f"{shown(value)}"
    )


def _plain(value: Any) -> Any:
    """NumPy's numbers and members of enumerations as Python's own."""
    if isinstance(value, np.generic):
        return value.item()
    return int(value) if isinstance(value, enum.IntEnum) else value


def _common_type(values: list[Any], integers: Sequence[str]) -> str | None:
    """The type that holds all these values; None if there is none."""
    classes = {str if isinstance(value, bytes) else type(value) for value in values}
    if classes == {bool}:
        return "BOOL"
    if classes == {str}:
        return "STRING"
    if classes == {int}:
        return next((name for name in integers if _holds(name, values)), None)
    if classes == {float} and np.all(np.abs(values) <= np.finfo(np.float32).max):
        return "FLOAT32"
    return None


def _holds(integers: str, values: list[int]) -> bool:
    limits = np.iinfo(integers.lower())
    return int(limits.min) <= min(values) and max(values) <= int(limits.max)


def _as_bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _as_stored(values: list[Any], kind: str) -> list[Any]:
    return np.array(values, np.float32).tolist() if kind == "FLOAT32" else values
