"""The tensors of a GGUF file: their names, types and axes, before weights are read."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from cbp_jax.arguments import is_array, shown
from cbp_jax.constraints import Constraint
from cbp_jax.deploy.gguf_blocks import BLOCK_TYPES
from cbp_jax.deploy.onnx_weights import level_integers
from cbp_jax.deploy.packing import is_array_like
from cbp_jax.masking import (
    PyTree,
    check_patterns,
    compile_patterns,
    flatten_with_paths,
    is_floating,
    path_string,
)
from cbp_jax.state import ConstrainedLeaf, constrained_leaves

ByPath = Mapping[str, str] | Callable[[str], str | None]

FLOATS: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
Q8_0 = "Q8_0"  # rounds weights that are not constrained; a block has 32 bytes and a float16 scale
_Q8_0_WEIGHTS, _Q8_0_BYTES = 32, 34  # per block
_KERNELS = r"(.*/)?(kernel|w)"
_LONGEST_NAME = 63  # bytes, in llama.cpp


class FileTensor(NamedTuple):
    """A tensor of the file, and the leaf its weights are in."""

    name: str
    kind: str
    path: str
    weight: Any  # the leaf
    constraint: Constraint | None
    scale: Any  # None if there is no constraint
    layer: int | None  # the index along the first axis of the leaf; None if it is not stacked
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor, whose last axis GGUF lists first."""
        shape = self.weight.shape if self.layer is None else self.weight.shape[1:]
        return tuple(shape[::-1] if self.transposed else shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        if self.kind in FLOATS:
            return math.prod(self.shape) * FLOATS[self.kind].itemsize
        if self.kind == Q8_0:
            return math.prod(self.shape) // _Q8_0_WEIGHTS * _Q8_0_BYTES
        kind = BLOCK_TYPES[self.kind]
        return math.prod(self.shape) // kind.size * kind.nbytes

    @property
    def rows(self) -> Any:
        """The latent weights, in the shape of the tensor."""
        return self._arranged(self.weight)

    @property
    def row_scale(self) -> Any:
        """The scale of a constrained tensor, shape=() or like the rows, with 1 where it is one."""
        return self._arranged(self.scale) if self.scale.ndim else self.scale

    def _arranged(self, array: Any) -> Any:
        if self.layer is not None:
            array = array[self.layer if array.shape[0] > 1 else 0]
        return array.T if self.transposed else array


def plan_tensors(
    params: PyTree,
    opt_state: optax.OptState | None,
    names: Any,
    weight_type: Any,
    other_type: Any,
    transpose: Any,
) -> Iterator[FileTensor]:
    """Yields the tensors of the file, without reading weights; arguments as in `export_gguf`.

    Raises:
      ValueError: if the names, the types or the leaves do not fit; the error names the leaf.
      TypeError: if a leaf is not made of floating-point numbers, or an argument is of no such kind.
    """
    if not isinstance(other_type, str) or other_type not in {*FLOATS, Q8_0}:
        raise ValueError(f"other_type must be 'F32', 'F16' or 'Q8_0', got {shown(other_type)}")
    found = () if opt_state is None else constrained_leaves(params, opt_state)
    constrained = {path_string(leaf.path): leaf for leaf in found}
    leaves = [
        (path_string(path), leaf)
        for path, leaf in flatten_with_paths(params)
        if is_array_like(leaf)
    ]
    paths = [path for path, _ in leaves]
    patterns = compile_patterns(_KERNELS if transpose is None else transpose)
    if transpose is not None:
        check_patterns(patterns, paths)
    named = _by_path("names", names, paths)
    if nameless := [path for path in paths if named[path] is None]:
        raise ValueError(
            f"names has no name of a tensor for {', '.join(map(repr, nameless))}: name them, or "
            "leave them out of params"
        )
    if weight_type is None or isinstance(weight_type, str):
        asked: dict[str, Any] = dict.fromkeys(constrained, weight_type)
    else:
        asked = _by_path("weight_type", weight_type, list(constrained))
    taken: dict[str, str] = {}
    for path, leaf in leaves:
        kernel = any(pattern.fullmatch(path) for pattern in patterns)
        part = constrained.get(path)
        for tensor in _tensors_of(path, leaf, named[path], part, kernel):
            if tensor.name in taken:
                raise ValueError(
                    f"{taken[tensor.name]!r} and {path!r} are both named {tensor.name!r}: give "
                    'each its own name, with "{}" for the number of the layer if layers are stacked'
                )
            taken[tensor.name] = path
            if len(tensor.shape) < 2:
                kind = "F32"
            elif part is not None:
                kind = _choose_type(tensor, asked[path])
            else:
                kind = _check_rows(tensor, other_type)
            yield tensor._replace(kind=kind)


def _by_path(argument: str, given: Any, paths: Sequence[str]) -> dict[str, Any]:
    """What a mapping or a function gives for each path: a string, or None."""
    if isinstance(given, Mapping):
        known = set(paths)
        if unknown := [shown(key) for key in given if key not in known]:
            raise ValueError(
                f"{argument} has {', '.join(unknown[:5])}, but there is no such leaf; there are "
                f"{', '.join(map(repr, paths[:5])) or 'none'}"
            )
        found = {path: given.get(path) for path in paths}
    elif callable(given):
        found = {path: given(path) for path in paths}
    else:
        raise TypeError(
            f"{argument} is a mapping, or a function, from paths such as 'layer/kernel', got "
            f"{shown(given)}"
        )
    for path, value in found.items():
        if not isinstance(value, str | None):
            raise TypeError(f"{argument} gives {path!r} {shown(value)}, which is not a string")
    return found


def _tensors_of(
    path: str, leaf: Any, name: str, part: ConstrainedLeaf | None, kernel: bool
) -> Iterator[FileTensor]:
    """Yields a leaf's tensors, still without a type: one, or one per layer."""
    if not is_array(leaf) or not is_floating(leaf):
        raise TypeError(
            f"{path!r} is {type(leaf).__name__} of dtype {leaf.dtype}, and only arrays of "
            "floating-point numbers are exported: leave it out of params"
        )
    stacked = "{}" in name
    axes = leaf.ndim - stacked
    if leaf.size == 0 or not 0 <= axes <= 2:
        raise ValueError(
            f"{path!r} has shape {leaf.shape} and cannot be {name!r}: a tensor has one or two axes "
            'and is not empty. If the first axis is that of the layers, write "{}" for their '
            'number in the name, as in "blk.{}.attn_q.weight"'
        )
    constraint, scale = (None, None) if part is None else (part.constraint, part.scale)
    for layer in range(leaf.shape[0]) if stacked else [None]:
        own = name if layer is None else name.replace("{}", str(layer))
        if not 0 < len(own.encode()) <= _LONGEST_NAME:
            raise ValueError(
                f"{path!r} cannot be named {shown(own)}: a name has 1 to {_LONGEST_NAME} bytes"
            )
        yield FileTensor(own, "", path, leaf, constraint, scale, layer, kernel and axes == 2)


def _check_rows(tensor: FileTensor, other_type: str) -> str:
    """Returns the type of an unconstrained tensor, if its rows are whole blocks."""
    row = tensor.shape[-1]
    if other_type == Q8_0 and row % _Q8_0_WEIGHTS:
        raise ValueError(
            f"{tensor.path!r} cannot be Q8_0: its rows have {row} weights, no multiple of "
            f"{_Q8_0_WEIGHTS}. Give other_type as 'F32' or 'F16'"
        )
    return other_type


def _choose_type(tensor: FileTensor, asked: str | None) -> str:
    """Returns the type of a constrained tensor.

    Raises:
      ValueError: if it does not hold the levels, the rows or the scales.
    """
    assert tensor.constraint is not None
    if asked is not None and asked not in {*BLOCK_TYPES, *FLOATS}:
        raise ValueError(
            f"no weight type {shown(asked)}, asked for {tensor.path!r}: give one of "
            f"{', '.join(map(repr, [*BLOCK_TYPES, *FLOATS]))}"
        )
    if asked in FLOATS:
        return str(asked)
    found = level_integers(tensor.constraint)
    fitting = [
        name
        for name, kind in BLOCK_TYPES.items()
        if found is not None and set(found[1]) <= set(kind.integers)
    ]
    kind = BLOCK_TYPES.get(asked or next(iter(fitting), ""))
    row = tensor.shape[-1]
    others = [name for name in fitting if row % BLOCK_TYPES[name].size == 0]
    if kind is None or kind.name not in fitting:
        problem = f"the levels of its constraint {tensor.constraint.name!r} " + (
            f"need the integers {', '.join(map(str, found[1]))}"
            if found is not None
            else "are not multiples of a common unit"
        )
    elif row % kind.size:
        problem = f"its rows, of one output each, have {row} weights, no multiple of {kind.size}"
    elif tensor.row_scale.shape[-1:] not in ((), (1,)):
        problem, others = "it has scales along its rows: keep one per output instead", []
    else:
        return kind.name
    raise ValueError(
        f"{tensor.path!r} cannot be {kind.name if kind else 'of a low-bit type'}: {problem}. Give "
        f"its weight_type as {' or '.join(map(repr, [*others, *FLOATS]))}"
    )
