"""Which leaves of a parameter tree are constrained: paths, patterns and masks.

A leaf's path is the tuple of its keys as strings; written out they are joined by "/". A Flax NNX
variable counts as its value, so that `conv/kernel` names the same leaf in an NNX state and in a
dictionary.

By default a leaf is constrained if it is floating, has at least two axes, and its path does not
name it as a bias, a scale, the parameter of a norm, or a table of embeddings or positions: biases
of layers stacked for `scan` have two axes too. Of three axes or more, two must be longer than 1:
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

# Words of the last key, and of any key, that name what is no weight of a layer. "LayerNorm_0" has
# the words layer and norm.
_LAST_KEY = re.compile(r"bias(es)?|scale|gamma|beta|offset")
_ANY_KEY = re.compile(r"embed(s|der|ding|dings)?|wte|wpe|pos|position(s|al)?|[a-z]*norm|bn|ln")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def select(
    include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> Callable[[PyTree], PyTree]:
    """A mask that names leaves by patterns of their paths.

    A leaf is selected if `re.fullmatch(pattern, path)` holds for a pattern of `include` and for
    none of `exclude`.

    Args:
      include: a pattern or several; None selects the default: floating leaves with at least two
        axes, but no biases, scales, norm parameters, embeddings or position tables, recognized by
        their paths. Patterns select exactly what they match, biases and norm parameters too: end
        them with the name of the weights ("block1/.*/kernel").
      exclude: a pattern or several; None excludes nothing.

    Returns:
      A function from a parameter tree to a tree of bools of the same structure, to be given as
      `mask`. It raises ValueError when a pattern matches no path, listing the paths nearest to it.

    Raises:
      ValueError: if a pattern is not a regular expression.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"conv": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
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
    """Whether a node is a Flax NNX variable of one array; without importing flax, which this library does not need."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Variable) and len(jax.tree.leaves(node)) <= 1


def has_modules(tree: PyTree) -> bool:
    """Whether a tree is a Flax NNX module, or holds one."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return False
    return any(
        isinstance(node, nnx.Module)
        for node in jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Module))
    )


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
    """A path from jax's keys, which differ between dictionaries, sequences and attributes."""
    return tuple(
        next(str(getattr(key, name)) for name in ("key", "name", "idx") if hasattr(key, name))
        for key in keys
    )


def path_string(path: Path) -> str:
    """A path as people write it; a tree that is a single leaf has the path "(root)"."""
    return "/".join(path) or "(root)"


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is an array of real floating-point numbers."""
    return (
        hasattr(leaf, "shape")
        and hasattr(leaf, "dtype")
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def default_mask(params: PyTree) -> list[bool]:
    """Which leaves are constrained by default: kernels by their shape that their path does not name as anything else."""
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
    """One pattern, several or none, compiled; ValueError names the one that is not a regular expression."""
    if not isinstance(patterns, str | Iterable | None):
        raise ValueError(f"{patterns!r} is neither a pattern nor several of them")
    compiled = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns or ():
        try:
            compiled.append(re.compile(pattern))
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{pattern!r} is not a pattern: write a regular expression over paths ({error})"
            ) from error
    return compiled


def check_patterns(patterns: Iterable[re.Pattern[str]], paths: Sequence[str]) -> None:
    """Refuses a pattern that matches none of the paths: it is mistyped, or meant for another network."""
    for pattern in patterns:
        if not any(map(pattern.fullmatch, paths)):
            near = difflib.get_close_matches(pattern.pattern, paths, n=5, cutoff=0.3) or paths[:5]
            raise ValueError(
                f"pattern {pattern.pattern!r} matches none of the {len(paths)} paths; near misses: {', '.join(near)}. "
                "A pattern is a regular expression over the whole path: 'conv1/.*' matches all below conv1."
            )


def resolve_mask(mask: PyTree | Callable[[PyTree], PyTree] | None, params: PyTree) -> list[bool]:
    """A mask (a tree of bools or a prefix of one, a callable giving one, or None) as one bool a leaf of `params`."""
    if mask is None:
        return default_mask(params)
    # A module of bools may be callable too, but only a function is a callable leaf.
    tree = mask(params) if callable(mask) and all(map(callable, jax.tree.leaves(mask))) else mask
    for leaf in jax.tree.leaves(tree):
        if not (isinstance(leaf, bool | np.bool_)):
            raise TypeError(
                f"a mask holds bools, got {leaf!r} ({type(leaf).__name__}): True constrains a leaf, False leaves it"
            )
    try:
        return jax.tree.leaves(
            jax.tree.map(lambda flag, part: [bool(flag)] * len(jax.tree.leaves(part)), tree, params)
        )
    except ValueError as error:
        raise ValueError(
            f"the mask is neither a tree like the parameters nor a prefix of one: {error}"
        ) from error
