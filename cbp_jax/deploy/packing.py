"""Constrained weights as codes of a few bits: packing and unpacking.

The code of a weight is the index of its level, from 0 for the lowest, in
`bits = ceil(log2(number of levels))` bits; the weight is `levels[code] * scale`. `bits.py`
describes the layout of codes in bytes, `packed_file.py` that of the file.
"""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from cbp_jax.arguments import floating_dtype, is_array, is_numeric, shown
from cbp_jax.constraints import Constraint
from cbp_jax.deploy.bits import pack_bits, unpack_bits
from cbp_jax.deploy.packed import Packed, PackedError, PackedTensor, Rounding, check_packed
from cbp_jax.masking import Path, PyTree, flatten_with_paths, path_string
from cbp_jax.metrics import ON_LEVEL
from cbp_jax.state import ConstrainedLeaf, constrained_leaves


def pack(params: PyTree, opt_state: optax.OptState, *, round: bool = False) -> Packed:
    """Packs the weights for deployment: each constrained one as the index of its level.

    The codes of a tensor take `ceil(size * bits / 8)` bytes.

    Args:
      params: the latent weights. Unconstrained leaves are stored unchanged, so include what the
        network needs beside parameters, such as batch statistics:
        `nnx.state(model, (nnx.Param, nnx.BatchStat))`, or `{**params, "batch_stats": batch_stats}`
        with a dictionary. Leaves that are not arrays, such as the functions and settings of an
        Equinox module, are not stored: `unpack` takes them from its template.
      opt_state: any optimizer state with one or more links' states in it.
      round: whether to snap remaining weights to the nearest level. `Packed.rounding` and the
        printed table show how many moved by more than 1% of the scale, and how far.

    Returns:
      The packed weights, in host memory. `unpack` returns bit for bit what
      `quantize(params, opt_state)` does.

    Raises:
      ValueError: as `quantize` does; if, without `round`, weights are off their levels by more than
        1% of the scale, naming the layers and by how much; if constrained weights are NaN or scales
        are not finite; if two paths have the same name; if an array is spread over several hosts.
      TypeError: as `quantize` does; or if a leaf has a shape and a dtype but no values to store: a
        random key, or a `jax.ShapeDtypeStruct`.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.5, 0.5, 0.5]]), "bias": jnp.zeros(3)}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> packed = cbp_jax.pack(params, state)
      >>> packed.tensors["kernel"].codes, packed.nbytes
      (array([6], dtype=uint8), 17)
    """
    constrained = {leaf.path: leaf for leaf in constrained_leaves(params, opt_state)}
    tensors: dict[str, Any] = {}
    rounding = []
    for path, leaf in flatten_with_paths(params):
        name = tensor_name(path)
        if name in tensors:
            raise ValueError(f"two leaves have the path {path_string(path)!r}: rename one of them")
        if not is_array_like(leaf):
            continue
        _check_packable(path, leaf)
        if path in constrained:
            tensors[name], entry = _pack_leaf(constrained[path])
            rounding.append(entry)
        else:
            tensors[name] = np.asarray(leaf)
    off = [entry for entry in rounding if entry.moved]
    if off and not round:
        named = "; ".join(
            f"{entry.layer}: {entry.moved:,} weights, by up to {entry.furthest:.2g} of the scale"
            for entry in off[:10]
        )
        raise ValueError(
            f"{len(off)} of {len(rounding)} constrained layers have weights more than "
            f"{ON_LEVEL:.0%} of the scale off their levels ({named}): train on until "
            "constraint_failure_score is small, or give round=True to snap them to their levels"
        )
    return Packed(tensors, tuple(rounding))


def unpack(packed: Packed, template: PyTree = None, *, dtype: DTypeLike | None = None) -> PyTree:
    """Returns the weights, bit for bit those that `quantize` gives: `levels[code] * scale`.

    Under `jit` with `packed` as an argument, the codes stay packed in memory and are unpacked where
    they are used (`make_predict` does that).

    Args:
      packed: the result of `pack` or `load_packed`.
      template: a tree with the paths and shapes of the packed one, of arrays or of
        `jax.ShapeDtypeStruct`s: a Flax NNX state, an Equinox module, ... Its leaves that are not
        arrays become part of the result. None gives nested dictionaries.
      dtype: dtype of the constrained weights; None keeps their own.

    Returns:
      A tree of the template's structure.

    Raises:
      PackedError: if a tensor is missing from either side or has another shape; if its parts do not
        fit each other; if it has 64 bits and JAX does not have x64 enabled; or if, without a
        template, names such as "a" and "a/b" cannot be in one tree. The error names the tensor.
      TypeError: if `packed` is not a `Packed`, or one that holds something else; or if `dtype` is
        not floating.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.5, 0.5, 0.5]]), "bias": jnp.zeros(3)}
      >>> packed = cbp_jax.pack(params, cbp_jax.cbp(constraint="binary").init(params))
      >>> print(cbp_jax.unpack(packed)["kernel"])
      [[-0.5  0.5  0.5]]
    """
    check_packed(packed, "unpack")
    wanted = floating_dtype(dtype)
    if dtype is not None and wanted is None:
        raise TypeError(f"dtype must be floating, got {shown(dtype)}")
    if template is None:
        return _nested(
            {name: _unpack_tensor(name, tensor, wanted) for name, tensor in packed.tensors.items()}
        )
    pairs = [(tensor_name(path), leaf) for path, leaf in flatten_with_paths(template)]
    leaves = {name: leaf for name, leaf in pairs if is_array_like(leaf)}
    for name in leaves:
        if name not in packed.tensors:
            raise PackedError(
                f"the packed weights have no {name!r}, which the template has; "
                f"they have {_first_names(packed.tensors)}"
            )
    for name, tensor in packed.tensors.items():
        if name not in leaves:
            raise PackedError(
                f"the template has no {name!r}, which the packed weights have; "
                f"it has {_first_names(leaves)}"
            )
        if tuple(tensor.shape) != jnp.shape(leaves[name]):
            raise PackedError(
                f"{name!r} has shape {tuple(tensor.shape)}, but the template's has "
                f"{jnp.shape(leaves[name])}"
            )
    restored = [
        _unpack_tensor(name, packed.tensors[name], wanted) if name in leaves else leaf
        for name, leaf in pairs
    ]
    return jax.tree.unflatten(jax.tree.structure(template), restored)


def tensor_name(path: Path) -> str:
    """A path as the name of a tensor; it is reversible to the path."""
    return "/".join(key.replace("~", "~0").replace("/", "~1") or "~2" for key in path)


def _path_from_name(name: str) -> Path:
    keys = name.split("/") if name else []
    return tuple("" if key == "~2" else key.replace("~1", "/").replace("~0", "~") for key in keys)


def _nested(tensors: dict[str, Any]) -> PyTree:
    tree: dict[str, Any] = {}
    if tensors.keys() == {""}:
        return tensors[""]
    for name, tensor in tensors.items():
        node: Any = tree
        *path, last = _path_from_name(name) or ("",)
        for key in path:
            node = node.setdefault(key, {}) if isinstance(node, dict) else node
        if not name or not isinstance(node, dict) or last in node:
            raise PackedError(
                f"{name!r} and another tensor cannot be in one nested dictionary: give a template"
            )
        node[last] = tensor
    return tree


def _first_names(names: Iterable[str]) -> str:
    return ", ".join(map(repr, itertools.islice(names, 5))) or "none"


def is_array_like(leaf: Any) -> bool:
    """Whether a leaf has a shape and a dtype, unlike the functions and settings of a module."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _check_packable(path: Path, leaf: Any) -> None:
    start = f"{path_string(path)!r} cannot be packed: it is"
    if not is_array(leaf):
        raise TypeError(f"{start} {type(leaf).__name__}, and only arrays can be")
    if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise TypeError(f"{start} a random key; leave it out, as nnx.state(model, nnx.Param) does")
    if not is_numeric(leaf.dtype):
        raise TypeError(f"{start} of dtype {leaf.dtype}, not of numbers")
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        raise ValueError(
            f"{start} spread over several hosts: gather the parameters and the state first, with "
            "jax.experimental.multihost_utils.process_allgather(..., tiled=True)"
        )


def _pack_leaf(leaf: ConstrainedLeaf) -> tuple[PackedTensor, Rounding]:
    codes, moved, furthest, finite = _encode_weights(leaf.weight, leaf.scale, leaf.constraint)
    if not finite:
        raise ValueError(
            f"{path_string(leaf.path)!r} cannot be packed: some of its weights are NaN, or its "
            "scale is not finite"
        )
    packed = PackedTensor(
        np.asarray(codes),
        np.asarray(leaf.scale, jnp.promote_types(leaf.weight.dtype, jnp.float32)),
        leaf.constraint,
        tuple(leaf.weight.shape),
        jnp.dtype(leaf.weight.dtype).name,
    )
    return packed, Rounding(tensor_name(leaf.path), int(moved), float(furthest))


@functools.partial(jax.jit, static_argnums=2)
def _encode_weights(
    w: jax.Array, scale: jax.Array, constraint: Constraint
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns codes, the number of weights off level, the largest distance, and whether finite."""
    finite = jnp.all(~jnp.isnan(w)) & jnp.all(jnp.isfinite(scale))
    on_level = constraint.quantize(w, scale)
    compute = jnp.promote_types(w.dtype, jnp.float32)
    distance = jnp.where(w == on_level, 0, jnp.abs(w.astype(compute) - on_level.astype(compute)))
    # Infinite where the scale is 0.
    relative = jnp.where(distance > 0, distance / jnp.asarray(scale, compute), 0)
    codes = pack_bits(constraint.level_index(w, scale).reshape(-1), constraint.bits)
    return codes, jnp.sum(relative > ON_LEVEL), jnp.max(relative, initial=0), finite


def _unpack_tensor(name: str, tensor: Any, dtype: np.dtype | None) -> jax.Array:
    own = jnp.dtype(tensor.dtype)
    if not isinstance(tensor, PackedTensor):
        _check_dtype_enabled(name, own)
        return jnp.asarray(tensor)
    wanted = jnp.dtype(dtype or own)
    _check_dtype_enabled(name, wanted)
    return _decode_weights(tensor, wanted)


def _check_dtype_enabled(name: str, dtype: jnp.dtype) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise PackedError(f"{name!r} is {dtype}, which JAX would cut to half: set jax_enable_x64")


@functools.partial(jax.jit, static_argnums=1)
def _decode_weights(tensor: PackedTensor, dtype: jnp.dtype) -> jax.Array:
    """Computes the weights as `Constraint.quantize` does, so that the last bit agrees."""
    if not tensor.size:
        return jnp.zeros(tensor.shape, dtype)
    own = jnp.dtype(tensor.dtype)
    compute = jnp.promote_types(own, jnp.float32)
    index = unpack_bits(tensor.codes, tensor.constraint.bits, tensor.size).reshape(tensor.shape)
    levels = tensor.constraint.levels
    if len(levels) <= 16:  # compares and selects, which fuse; a table is a gather
        value = jnp.asarray(levels[0], compute)
        for code, level in enumerate(levels[1:], 1):
            value = jnp.where(index == code, jnp.asarray(level, compute), value)
    else:
        value = jnp.asarray(levels, compute)[index]
    weights = jnp.broadcast_to(value, tensor.shape) * jnp.asarray(tensor.scale, compute)
    return weights.astype(own).astype(dtype)
