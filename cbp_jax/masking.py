"""Which leaves of a parameter tree are constrained: paths, patterns and masks.

A leaf's path is the tuple of its keys as strings, written joined by "/". A Flax NNX variable is
treated as its value, so that `conv/kernel` names the same leaf in an NNX state and in a dictionary.

By default a leaf is constrained if it is floating, has at least two axes, and its path does not
name it as a bias, a scale, a norm parameter, or a table of embeddings or positions (biases of
layers stacked for `scan` have two axes too). Of three axes or more, two must be longer than 1:
Equinox's convolutions have biases of shape (channels, 1, 1).
"""

import difflib
import re
import sys
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Path = tuple[str, ...]

# Words in the last key, and in any key, of leaves that are not kernels. The words of "LayerNorm_0"
# are layer and norm.
_LAST_KEY = re.compile(r"bias(es)?|scale|gamma|beta|offset")
_ANY_KEY = re.compile(r"embed(s|der|ding|dings)?|wte|wpe|pos|position(s|al)?|[a-z]*norm|bn|ln")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def select(
    include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> Callable[[PyTree], PyTree]:
    """Returns a mask that selects leaves by patterns of their paths.

    A leaf is selected if `re.fullmatch(pattern, path)` holds for a pattern in `include` and for
    none in `exclude`.

    Args:
      include: one or more patterns. They select exactly what they match, including biases and norm
        parameters, so end them with the name of the weights ("block1/.*/kernel"). None selects the
        default: floating leaves with at least two axes, except biases, scales, norm parameters,
        embeddings and position tables, recognized by their paths.
      exclude: one or more patterns; None excludes nothing.

    Returns:
      A function from a parameter tree to a tree of bools of the same structure, to pass as `mask`.
      It raises ValueError if a pattern matches no path, and lists near misses.

    Raises:
      ValueError: if a pattern is not a regular expression.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> conv = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
      >>> params = {"conv": conv, "head": {"kernel": jnp.ones((3, 2))}}
      >>> cbp_jax.select(exclude="head/.*")(params)
      {'conv': {'bias': False, 'kernel': True}, 'head': {'kernel': False}}
    """
    included, excluded = compile_patterns(include), compile_patterns(exclude)

    def mask(params: PyTree) -> PyTree:
        names = [path_string(path) for path, _ in flatten_with_paths(params)]
        check_patterns([*included, *excluded], names)
        chosen = [
            (any(p.fullmatch(name) for p in included) if include is not None else default)
            and not any(p.fullmatch(name) for p in excluded)
            for name, default in zip(names, default_mask(params), strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(params), chosen)

    return mask


def is_variable(node: Any) -> bool:
    """Whether a node is a Flax NNX variable that holds a single array."""
    nnx = sys.modules.get("flax.nnx")  # not imported: this library does not depend on Flax
    return nnx is not None and isinstance(node, nnx.Variable) and len(jax.tree.leaves(node)) <= 1


def has_modules(tree: PyTree) -> bool:
    """Whether a tree is or contains a Flax NNX module."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Module))
    return any(isinstance(node, nnx.Module) for node in nodes)


def flatten_with_paths(
    tree: PyTree, is_leaf: Callable[[Any], bool] = lambda node: False
) -> list[tuple[Path, Any]]:
    """The leaves of a tree with their paths, in the order of `jax.tree.leaves`."""
    nodes = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: is_variable(node) or is_leaf(node)
    )[0]
    return [
        (as_path(keys), leaf)
        for keys, node in nodes
        for leaf in (jax.tree.leaves(node, is_leaf=is_leaf) if is_variable(node) else [node])
    ]


def as_path(keys: Iterable[Any]) -> Path:
    """Converts jax's keys, which differ between dictionaries, sequences and attributes."""
    return tuple(
        next(str(getattr(key, name)) for name in ("key", "name", "idx") if hasattr(key, name))
        for key in keys
    )


def path_string(path: Path) -> str:
    """A path as text; that of a tree that is a single leaf is "(root)"."""
    return "/".join(path) or "(root)"


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers."""
    return (
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def default_mask(params: PyTree) -> list[bool]:
    """One bool per leaf: whether it is constrained by default (see the top of this file)."""
    leaves = flatten_with_paths(params)
    paths = {path for path, _ in leaves}
    return [
        _has_kernel_shape(leaf) and not _is_named_as_no_kernel(path, paths) for path, leaf in leaves
    ]


def _has_kernel_shape(leaf: Any) -> bool:
    return is_floating(leaf) and (len(leaf.shape) == 2 or sum(n > 1 for n in leaf.shape) >= 2)


def _is_named_as_no_kernel(path: Path, paths: Container[Path]) -> bool:
    if path[-1:] == ("b",) and (*path[:-1], "w") in paths:
        return True
    words = [[word.lower() for word in _WORD.findall(key)] for key in path]
    return any(_ANY_KEY.fullmatch(word) for key in words for word in key) or any(
        _LAST_KEY.fullmatch(word) for key in words[-1:] for word in key
    )


def compile_patterns(patterns: str | Iterable[str] | None) -> list[re.Pattern[str]]:
    """Compiles one pattern, several or none; raises ValueError for an invalid one."""
    if not isinstance(patterns, str | Iterable | None) or hasattr(patterns, "shape"):
        raise ValueError(f"{patterns!r} is not a pattern, nor a sequence of patterns")
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            compiled.append(re.compile(pattern))
            compiled[-1].fullmatch("")  # those of bytes do not match strings
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{pattern!r} is not a pattern: write a regular expression over paths ({error})"
            ) from error
    return compiled


def check_patterns(patterns: Iterable[re.Pattern[str]], paths: Sequence[str]) -> None:
    """Raises ValueError if a pattern matches no path."""
    for pattern in patterns:
        if not any(map(pattern.fullmatch, paths)):
            near = difflib.get_close_matches(pattern.pattern, paths, n=5, cutoff=0.3) or paths[:5]
            raise ValueError(
                f"pattern {pattern.pattern!r} matches none of the {len(paths)} paths; near misses: "
                f"{', '.join(near)}. A pattern is a regular expression over the whole path: "
                "'conv1/.*' matches everything below conv1."
            )


def resolve_mask(mask: PyTree | Callable[[PyTree], PyTree] | None, params: PyTree) -> list[bool]:
    """Resolves a mask to one bool per leaf of `params`.

    Args:
      mask: a tree of bools, a prefix of one, a callable from parameters to either, or None for the
        default.
      params: the parameters.

    Raises:
      TypeError: if the mask holds anything but bools.
      ValueError: if its structure does not fit the parameters.
    """
    if mask is None:
        return default_mask(params)
    # A module of bools may be callable too, but it has leaves that are not.
    tree = mask(params) if callable(mask) and all(map(callable, jax.tree.leaves(mask))) else mask
    for leaf in jax.tree.leaves(tree):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"a mask holds bools, got {leaf!r} ({type(leaf).__name__}): True constrains a "
                "leaf, False does not"
            )
    try:
        return jax.tree.leaves(
            jax.tree.map(lambda flag, part: [bool(flag)] * len(jax.tree.leaves(part)), tree, params)
        )
    except ValueError as error:
        raise ValueError(
            f"the mask is neither a tree like the parameters nor a prefix of one: {error}"
        ) from error
