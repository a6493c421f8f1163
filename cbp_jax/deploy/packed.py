"""Packed weights in memory: a tensor's codes and scale, and a network's tensors by name."""

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from cbp_jax.arguments import floating_dtype, is_array, is_numeric, shown
from cbp_jax.constraints import Constraint
from cbp_jax.metrics import aligned


class PackedError(ValueError):
    """Packed weights that are damaged, incomplete, or do not fit; the message names the tensor."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class PackedTensor:
    """A packed constrained tensor; a pytree whose leaves are the codes and the scale."""

    codes: Any  #: shape=(ceil(size * bits / 8),), dtype=uint8
    #: shape=(), or like the weights with 1 along the axes that share a scale; float32, or float64
    #: if the weights are
    scale: Any
    constraint: Constraint = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: str = dataclasses.field(metadata={"static": True})  #: of the weights

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        return int(self.codes.nbytes + self.scale.nbytes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PackedTensor):
            return NotImplemented
        return (
            self.constraint == other.constraint
            and (self.shape, self.dtype) == (other.shape, other.dtype)
            and _equal_bits(self.codes, other.codes)
            and _equal_bits(self.scale, other.scale)
        )

    __hash__ = None  # type: ignore[assignment]  # it holds arrays


class Rounding(NamedTuple):
    """How far packing moved the weights of a layer."""

    layer: str
    moved: int  # weights that were off their level by more than 1% of the scale
    furthest: float  # over all weights, in units of the scale; infinite where the scale is 0


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A network's tensors by name, the constrained ones packed; prints as a table.

    It is a pytree, so jitted and exported functions may take it as an argument. Names are paths
    joined by "/". In a key "~" is written "~0" and "/" is written "~1" (as in JSON pointers); an
    empty key is "~2", and a tree that is a single leaf has the name "".
    """

    tensors: dict[str, Any]  #: PackedTensor or array
    #: One per constrained layer; not saved, compared or kept by tree transformations.
    rounding: tuple[Rounding, ...] = ()

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, without a file's header."""
        return sum(int(tensor.nbytes) for tensor in self.tensors.values())

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Packed):
            return NotImplemented
        if set(self.tensors) != set(other.tensors):
            return False
        pairs = [(tensor, other.tensors[name]) for name, tensor in self.tensors.items()]
        return all(
            a == b
            if isinstance(a, PackedTensor) or isinstance(b, PackedTensor)
            else _equal_bits(a, b)
            for a, b in pairs
        )

    __hash__ = None  # type: ignore[assignment]

    def tree_flatten_with_keys(
        self,
    ) -> tuple[tuple[tuple[jax.tree_util.DictKey, Any], ...], tuple[str, ...]]:
        names = tuple(sorted(self.tensors))
        return tuple((jax.tree_util.DictKey(name), self.tensors[name]) for name in names), names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], tensors: Iterable[Any]) -> "Packed":
        return cls(dict(zip(names, tensors, strict=True)))

    def __str__(self) -> str:
        rows = [("tensor", "constraint", "weights", "bits", "bytes", "moved", "furthest / scale")]
        rounding = {entry.layer: entry for entry in self.rounding}
        others = []
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, PackedTensor):
                others.append(tensor)
                continue
            rule, size, nbytes = tensor.constraint, f"{tensor.size:,}", f"{tensor.nbytes:,}"
            moved, furthest = "", ""
            if name in rounding:
                moved, furthest = f"{rounding[name].moved:,}", f"{rounding[name].furthest:.2g}"
            rows.append((name, rule.name, size, str(rule.bits), nbytes, moved, furthest))
        if others:
            size = f"{sum(int(tensor.size) for tensor in others):,}"
            nbytes = f"{sum(int(tensor.nbytes) for tensor in others):,}"
            rows.append((f"{len(others)} others", "none", size, "", nbytes, "", ""))
        return "\n".join(aligned(rows if rounding else [row[:5] for row in rows]))


def check_packed(packed: Any, function: str) -> None:
    """Checks that packed weights have the form that `pack` gives them.

    Raises:
      TypeError: if they are no `Packed`, or it does not hold arrays and packed tensors by name.
      PackedError: if the parts of a packed tensor do not fit each other.
    """
    if not isinstance(packed, Packed):
        raise TypeError(f"{function} takes the result of pack, got {type(packed).__name__}")
    if not isinstance(packed.tensors, dict):
        raise TypeError(
            f"Packed holds a dictionary of tensors, got {type(packed.tensors).__name__}"
        )
    for name, tensor in packed.tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of a packed tensor is a string, got {shown(name)}")
        if isinstance(tensor, PackedTensor):
            try:
                check_tensor(tensor)
            except (TypeError, ValueError) as error:
                raise PackedError(f"packed tensor {name!r}: {error}") from error
        elif not is_array(tensor) or not is_numeric(tensor.dtype):
            kind = tensor.dtype if is_array(tensor) else type(tensor).__name__
            raise TypeError(f"{name!r} is {kind}, neither an array of numbers nor a PackedTensor")


def check_tensor(tensor: PackedTensor) -> None:
    """Raises TypeError or ValueError if the parts of a packed tensor do not fit each other."""
    codes, scale, constraint, shape = tensor.codes, tensor.scale, tensor.constraint, tensor.shape
    if not isinstance(constraint, Constraint):
        raise TypeError(f"its constraint is {shown(constraint)}")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise TypeError(f"{shown(shape)} is not a shape")
    if not (is_array(codes) and is_array(scale)):
        raise TypeError("its codes and scale must be arrays")
    dtype = floating_dtype(tensor.dtype)
    if dtype is None:
        raise TypeError(f"its dtype is {shown(tensor.dtype)}, not floating")
    nbytes = (tensor.size * constraint.bits + 7) // 8
    check_equal("number of bytes", (codes.shape, codes.dtype), ((nbytes,), np.dtype("uint8")))
    check_equal("dtype of the scale", scale.dtype, jnp.promote_types(dtype, jnp.float32))
    if scale.ndim:
        check_equal("number of axes of the scale", scale.ndim, len(shape))
        check_equal("shape of the scale", np.broadcast_shapes(scale.shape, shape), shape)


def check_equal(what: str, found: Any, expected: Any) -> None:
    """Raises ValueError if a part of a packed tensor is not what others make it."""
    if found != expected:
        raise ValueError(f"{what} is {found}, and {expected} was expected")


def _equal_bits(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _register_for_export() -> None:
    """Lets exported functions take a `Packed`: its static parts are stored with them as JSON."""

    def constraint_to_json(aux: Any) -> bytes:
        constraint, shape, dtype = aux
        return json.dumps([constraint.name, constraint.levels, shape, dtype]).encode()

    def constraint_from_json(data: bytes) -> Any:
        name, levels, shape, dtype = json.loads(data)
        return Constraint(name, tuple(levels)), tuple(shape), dtype

    export.register_pytree_node_serialization(
        PackedTensor,
        serialized_name="cbp_jax.PackedTensor",
        serialize_auxdata=constraint_to_json,
        deserialize_auxdata=constraint_from_json,
    )
    export.register_pytree_node_serialization(
        Packed,
        serialized_name="cbp_jax.Packed",
        serialize_auxdata=lambda names: json.dumps(names).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )


_register_for_export()
