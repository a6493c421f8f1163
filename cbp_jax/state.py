"""The links' states and their readers: the forward weights, the window, the scales.

The functions here accept any optimizer state and find the links' states in it. They pair the leaves
of a state with parameters by path, so that a Flax NNX state, its pure form and the `opt_state` of
an `nnx.Optimizer` all fit each other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from cbp_jax.arguments import check_function, check_weight, is_array
from cbp_jax.constraints import Constraint
from cbp_jax.masking import (
    Path,
    PyTree,
    as_path,
    flatten_with_paths,
    has_modules,
    is_variable,
    path_string,
)
from cbp_jax.scales import SCALE_FORM, ScaleFn, measure_scale


class CBPState(NamedTuple):
    """State of the `cbp` link; "float" means float32, or float64 under x64.

    Trees have the structure of the parameters, with `optax.MaskedNode` for unconstrained leaves.
    The constraints are structure, not arrays: pickle and `jax.tree` keep them, but Orbax saves only
    arrays. To be sure that a state is restored under its own constraint, save
    `cbp_jax.describe(state)` with it and call `cbp_jax.check_description` after restoring.
    """

    #: shape=(), int32: steps taken, saturating; informational
    count: jax.Array  # type: ignore[assignment]
    step_in_epoch: jax.Array  #: shape=(), int32: wraps at steps_per_epoch
    started: jax.Array  #: shape=(), bool: whether the first step has been taken
    constraints: PyTree  #: one Constraint per constrained leaf, part of the tree's structure
    multipliers: PyTree  #: one per constrained weight, sharded like it
    weight_scale: PyTree  #: per leaf, shape=() or with kept dimensions
    window: jax.Array  #: shape=(), float: g, from initial_window to infinity
    multiplier_opt_state: optax.OptState
    lagrangian_sum: jax.Array  #: shape=(), float: over this epoch so far; -inf: not comparable
    lagrangian_lost: jax.Array  #: shape=(), float: what rounding has added to it, to subtract
    #: shape=(), float: over the last epoch; inf: none yet; -inf: not comparable
    previous_sum: jax.Array
    patience_used: jax.Array  #: shape=(), int32: epochs since the window grew
    skipped_values: jax.Array  #: shape=(), int32: steps whose value was missing or not finite
    #: shape=(), int32: ascent steps of the multipliers, including that of the first call
    multiplier_updates: jax.Array


class ClosingState(NamedTuple):
    """State of `closing`; trees and "float" as in `CBPState`."""

    #: shape=(), int32: steps taken, saturating
    count: jax.Array  # type: ignore[assignment]
    constraints: PyTree
    multipliers: PyTree  #: in units of the root mean square of the leaf's gradient
    weight_scale: PyTree
    window: jax.Array  #: shape=(), float: that of the last step
    mean_square: PyTree  #: per leaf, shape=(): of its gradient, a running mean from 0
    inner: optax.OptState


class STEState(NamedTuple):
    """State of the `ste` link: what `quantize` needs; trees as in `CBPState`."""

    constraints: PyTree
    weight_scale: PyTree


State = CBPState | ClosingState | STEState


class ConstrainedLeaf(NamedTuple):
    """A constrained parameter with its part of the state."""

    path: Path
    weight: jax.Array
    constraint: Constraint
    scale: jax.Array
    multiplier: jax.Array | None  # None under `ste`


def quantize(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """Returns the forward weights: constrained leaves on their nearest levels, others unchanged.

    With `q(w)` the level nearest to `w`, times its scale, the result is `q(w)` on constrained
    leaves and `w` elsewhere. Differentiating a loss at the result and applying the gradient to
    `params` is the straight-through estimator.

    Args:
      params: the latent weights. Leaves that the state does not know are returned unchanged. For a
        Flax NNX module the result is a module that shares all variables but the constrained ones
        with it, so that a forward pass of the result updates its batch statistics and dropout
        counters.
      opt_state: any optimizer state with one or more links' states in it, including
        `nnx.Optimizer.opt_state`.

    Returns:
      A tree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: if the state holds no `CBPState`, constrains a leaf twice, or does not fit the
        parameters; the error names the leaf.
      TypeError: if a constrained leaf, or its part of the state, is not an array with values.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25]]), "bias": jnp.array([0.25])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> print(cbp_jax.quantize(params, state)["kernel"])
      [[-0.5  0.5]]

    Reference: Kim and Jeong (2021), section 3.3.
    """
    on_levels = {
        leaf.path: leaf.constraint.quantize(leaf.weight, leaf.scale)
        for leaf in constrained_leaves(params, opt_state)
    }
    if has_modules(params):
        return _replace_variables(params, on_levels)
    leaves = [on_levels.get(path, leaf) for path, leaf in flatten_with_paths(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def _replace_variables(module: PyTree, values: dict[Path, jax.Array]) -> PyTree:
    """An NNX module with new variables for these values, sharing all others with the original."""
    from flax import nnx  # imported already, since there is a module

    def replace(keys: Any, variable: Any) -> Any:
        value = values.get(as_path(keys))
        return variable if value is None else variable.replace(value)

    graphdef, state = nnx.split(module)
    return nnx.merge(
        graphdef, jax.tree_util.tree_map_with_path(replace, state, is_leaf=is_variable)
    )


def window(opt_state: optax.OptState) -> jax.Array:
    """Returns the current window `g`, for schedules and logs.

    It starts at `initial_window`, under `closing` at 1, and grows to infinity, where every weight
    is constrained. Under `closing` it is that of the last step.

    Args:
      opt_state: any optimizer state with one or more links' states in it.

    Returns:
      Array of shape (), float; the smallest window if there are several links.

    Raises:
      ValueError: if no link in the state has a window, as under `ste`.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> print(cbp_jax.window(cbp_jax.cbp(constraint="binary").init({"kernel": jnp.ones((2, 2))})))
      1.0

    Reference: Kim and Jeong (2021), section 3.2.
    """
    states = find_states(opt_state)
    windows = [state.window for state in states if not isinstance(state, STEState)]
    if not windows:
        raise ValueError(
            "`ste` has no window: give the state of an optimizer with cbp_jax.cbp or closing"
        )
    return windows[0] if len(windows) == 1 else jnp.min(jnp.stack(windows))


def refit_scales(
    params: PyTree, opt_state: optax.OptState, scale_fn: ScaleFn | None = None
) -> optax.OptState:
    """Returns a new state whose scales are measured on these parameters.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more links' states in it; it is not changed.
      scale_fn: the function given to the link; None measures the mean absolute value.

    Returns:
      A state of the same structure with a new `weight_scale`, per tensor or per channel as before.

    Raises:
      ValueError: as `quantize` does; or if a leaf is not finite, zero throughout, or its levels
        overflow.
      TypeError: as `quantize` does; or if `scale_fn` is no function, or does not return numbers.

    Example:
      >>> import jax, jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25]])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> state = cbp_jax.refit_scales(jax.tree.map(lambda w: 4 * w, params), state)
      >>> print(state.weight_scale["kernel"])
      2.0
    """
    check_function("scale_fn", scale_fn, SCALE_FORM)
    scales = {}
    for leaf in constrained_leaves(params, opt_state):
        kept_axes = tuple(axis for axis, n in enumerate(leaf.scale.shape) if n > 1)
        scales[leaf.path] = measure_scale(
            leaf.path, leaf.weight, leaf.constraint, kept_axes, scale_fn
        )

    def refit(node: Any) -> Any:
        if not isinstance(node, State):
            return node
        old = flatten_with_paths(node.weight_scale)
        new = [scales[path].reshape(scale.shape) for path, scale in old]
        structure = jax.tree.structure(node.weight_scale)
        return node._replace(weight_scale=jax.tree.unflatten(structure, new))

    return jax.tree.map(refit, opt_state, is_leaf=lambda node: isinstance(node, State))


def float_dtype() -> jnp.dtype:
    """The dtype of sums and of the window: float64 under x64, else float32."""
    return jax.dtypes.canonicalize_dtype(float)


def find_states(opt_state: optax.OptState) -> list[State]:
    """Returns every state of a link in an optimizer state, without NNX variables.

    Raises:
      ValueError: if there is none.
    """
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, State))
    states = [_unwrap_variables(node) for node in nodes if isinstance(node, State)]
    if not states:
        raise ValueError(
            "no CBPState in this optimizer state, nor that of another link: give the state of an "
            "optimizer with cbp_jax.cbp, cbp_sgd, closing or ste in it, as its init or update "
            "returned it "
            f"(got {type(opt_state).__name__})"
        )
    return states


def _unwrap_variables(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if is_variable(node) else node,
        tree,
        is_leaf=is_variable,
    )


def constrained_leaves(params: PyTree, opt_state: optax.OptState) -> list[ConstrainedLeaf]:
    """Pairs the constrained parameters, in their order, with constraint, scale and multiplier.

    Raises:
      ValueError: if two links constrain a leaf, or a state does not fit the parameters.
    """
    weights = dict(flatten_with_paths(params))
    found: dict[Path, ConstrainedLeaf] = {}
    for state in find_states(opt_state):
        for leaf in pair_with_state(weights, state):
            if leaf.path in found:
                raise ValueError(
                    f"{path_string(leaf.path)!r} is constrained by two links, "
                    f"{found[leaf.path].constraint.name!r} and {leaf.constraint.name!r}: "
                    "give the links masks that do not overlap"
                )
            found[leaf.path] = leaf
    return [found[path] for path in weights if path in found]


def check_state(name: str, state: Any, kind: type) -> None:
    """Raises TypeError if a state is not of the kind that a link's `init` returns."""
    if not isinstance(state, kind):
        raise TypeError(
            f"the state of {name} is a {kind.__name__}, got {type(state).__name__}: give update "
            "the state that init, or the update before, returned"
        )


def pair_all(name: str, params: PyTree | None, state: State, kind: type) -> list[ConstrainedLeaf]:
    """Pairs parameters with the state of one link, of this name and kind of state.

    Raises:
      ValueError: if there are no parameters, or the state does not know one of them.
      TypeError: if the state is of another kind, or as `pair_with_state` does.
    """
    check_state(name, state, kind)
    if params is None:
        raise ValueError(
            "the link needs the parameters: call optimizer.update(grads, state, params), under cbp "
            "with value=loss"
        )
    weights = dict(flatten_with_paths(params))
    leaves = pair_with_state(weights, state)
    unknown = weights.keys() - {path for path, _ in state_paths(state)}
    if unknown:
        raise ValueError(
            f"the state does not know {', '.join(sorted(map(path_string, unknown))[:5])}: "
            "give the parameters that the optimizer's init was given"
        )
    return leaves


def state_paths(state: State) -> list[tuple[Path, Constraint | optax.MaskedNode]]:
    """Returns all leaves that a state knows, with a `MaskedNode` for unconstrained ones."""
    return flatten_with_paths(state.constraints, is_leaf=is_rule)


def constrained_parts(state: State) -> list[tuple[Path, Constraint, Any, Any]]:
    """Returns the path, constraint, scale and multiplier (None under `ste`) per constrained leaf.

    Raises:
      ValueError: if the state lacks some of them.
    """
    constrained = [
        (path, constraint)
        for path, constraint in state_paths(state)
        if isinstance(constraint, Constraint)
    ]
    scales = jax.tree.leaves(state.weight_scale)
    multipliers = [None] * len(scales)
    if not isinstance(state, STEState):
        multipliers = jax.tree.leaves(state.multipliers)
    if not len(constrained) == len(scales) == len(multipliers):
        raise ValueError(
            f"the state is incomplete: for {len(constrained)} constrained leaves it has "
            f"{len(scales)} scales and {len(multipliers)} multipliers; give the state as init or "
            "update returned it"
        )
    return [
        (*leaf, scale, multiplier)
        for leaf, scale, multiplier in zip(constrained, scales, multipliers, strict=True)
    ]


def is_rule(node: Any) -> bool:
    """Whether a node of `constraints` stands for a leaf of the parameters."""
    return isinstance(node, Constraint | optax.MaskedNode)


def pair_with_state(weights: dict[Path, Any], state: State) -> list[ConstrainedLeaf]:
    """Returns the leaves that one state constrains, in its order.

    Raises:
      ValueError: if the parameters lack one of them, its shape differs, or the state lacks a part.
      TypeError: if a parameter or its part of the state is not an array.
    """
    parts = constrained_parts(state)
    missing = [path_string(path) for path, *_ in parts if path not in weights]
    if missing:
        raise ValueError(
            f"the parameters lack {len(missing)} of the {len(parts)} leaves that the state "
            f"constrains: {', '.join(missing[:5])}. They have "
            f"{', '.join(map(path_string, list(weights)[:5])) or 'no leaves'}. "
            "Give the tree (or a tree with the same paths) that the optimizer's init was given."
        )
    leaves = []
    for path, constraint, scale, multiplier in parts:
        weight = weights[path]
        check_weight(path_string(path), weight)
        for part in (scale, multiplier):
            if part is not None and not is_array(part):
                raise TypeError(
                    f"the state's part for {path_string(path)!r} is {type(part).__name__}, not an "
                    "array: give the state as init or update returned it"
                )
        if multiplier is not None and jnp.shape(weight) != multiplier.shape:
            raise ValueError(
                f"{path_string(path)!r} has shape {jnp.shape(weight)}, but the state was made for "
                f"{multiplier.shape}: call the optimizer's init on these parameters"
            )
        if scale.ndim and not _broadcasts(scale.shape, jnp.shape(weight)):
            raise ValueError(
                f"the scale of {path_string(path)!r} has shape {scale.shape}, which does not fit "
                f"weights of shape {jnp.shape(weight)}: call the optimizer's init on these "
                "parameters; a state made under jax.vmap must be used under jax.vmap"
            )
        leaves.append(ConstrainedLeaf(path, weight, constraint, scale, multiplier))
    return leaves


def _broadcasts(scale: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a scale with kept dimensions fits weights of a shape."""
    return len(scale) == len(weight) and all(
        n in (1, m) for n, m in zip(scale, weight, strict=True)
    )
