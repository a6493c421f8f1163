"""What CBP remembers, and what is read from it: the forward weights, the window, the scales.

The functions here take any optimizer state and find the `CBPState`s in it. They pair a state's
leaves with parameters by path, so a Flax NNX state, its pure form and the `opt_state` of an
`nnx.Optimizer` all fit each other.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

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
from cbp_jax.scales import ScaleFn, measure_scale


class CBPState(NamedTuple):
    """State of the `cbp` link; "float" is float32, or float64 under x64.

    Trees have the structure of the parameters, with `optax.MaskedNode` where a leaf is not
    constrained. The constraints are structure, not arrays: pickle and `jax.tree` keep them, but
    Orbax writes arrays alone. To be sure that a state is restored under its own constraint, save
    `cbp_jax.describe(state)` with it and call `cbp_jax.check_description` when it is restored.
    """

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32: steps taken, saturating; informational
    step_in_epoch: jax.Array  # shape=(), dtype=int32: wraps at steps_per_epoch
    started: jax.Array  # shape=(), dtype=bool: whether the first step was taken
    constraints: PyTree  # one Constraint a constrained leaf, part of the tree's structure
    multipliers: PyTree  # one a constrained weight, sharded like it
    weight_scale: PyTree  # shape=() a leaf, or with kept dimensions
    window: jax.Array  # shape=(), float: g, from initial_window to infinity
    multiplier_opt_state: optax.OptState
    lagrangian_sum: jax.Array  # shape=(), float: of this epoch so far; -inf: not comparable
    previous_sum: (
        jax.Array
    )  # shape=(), float: of the last epoch; inf: none yet; -inf: not comparable
    patience_used: jax.Array  # shape=(), dtype=int32: epochs since the window grew
    skipped_values: jax.Array  # shape=(), dtype=int32: steps whose value was missing or not finite
    multiplier_updates: (
        jax.Array
    )  # shape=(), dtype=int32: ascent steps that the multipliers took, the first call's included


class ConstrainedLeaf(NamedTuple):
    """A constrained parameter with all that belongs to it."""

    path: Path
    weight: jax.Array
    constraint: Constraint
    scale: jax.Array
    multiplier: jax.Array


def quantize(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """The weights to run the forward pass with: constrained ones on their nearest levels, the
    others as they are.

    With `q(w)` the level nearest to `w` times its scale, the result is `q(w)` on constrained leaves
    and `w` elsewhere. To differentiate a loss at the result and apply the gradient to `params` is
    the straight-through estimator.

    Args:
      params: the latent weights; leaves the state does not know are left as they are. A Flax NNX
        module is taken too: the result is a module that shares every variable but the constrained
        ones with it, so that batch statistics and dropout counters that a forward pass of the
        result updates are updated in the module given.
      opt_state: any optimizer state with one or more `CBPState`s in it, `nnx.Optimizer.opt_state`
        too.

    Returns:
      A tree of the structure, shapes and dtypes of `params`.

    Raises:
      ValueError: if the state holds no `CBPState`, constrains a leaf twice, or does not fit the
        parameters; it names the leaf.

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
    """An NNX module with new variables for the given values; it shares all others with the original."""
    from flax import nnx  # imported already: there is a module of it

    def replace(keys: Any, variable: Any) -> Any:
        value = values.get(as_path(keys))
        return variable if value is None else variable.replace(value)

    graphdef, state = nnx.split(module)
    return nnx.merge(
        graphdef, jax.tree_util.tree_map_with_path(replace, state, is_leaf=is_variable)
    )


def window(opt_state: optax.OptState) -> jax.Array:
    """The window in force, for schedules and logs: 1 at the start, growing to infinity as the
    constraint closes.

    Args:
      opt_state: any optimizer state with one or more `CBPState`s in it.

    Returns:
      Array of shape (), float; of several links, the smallest.

    Raises:
      ValueError: if the state holds no `CBPState`.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> print(cbp_jax.window(cbp_jax.cbp(constraint="binary").init({"kernel": jnp.ones((2, 2))})))
      1.0

    Reference: Kim and Jeong (2021), section 3.2.
    """
    windows = [state.window for state in find_states(opt_state)]
    return windows[0] if len(windows) == 1 else jnp.min(jnp.stack(windows))


def refit_scales(
    params: PyTree, opt_state: optax.OptState, scale_fn: ScaleFn | None = None
) -> optax.OptState:
    """A new state whose scales are measured again, on these parameters.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more `CBPState`s in it; it is not changed.
      scale_fn: as given to `cbp`; None measures the mean absolute value.

    Returns:
      A state of the same structure, with new `weight_scale`, per tensor or per channel as before.

    Raises:
      ValueError: as `quantize` does; or if a leaf is zero or not finite throughout.

    Example:
      >>> import jax, jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25]])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> print(cbp_jax.refit_scales(jax.tree.map(lambda w: 4 * w, params), state).weight_scale["kernel"])
      2.0
    """
    scales = {
        leaf.path: measure_scale(
            leaf.path,
            leaf.weight,
            tuple(i for i, n in enumerate(leaf.scale.shape) if n > 1),
            scale_fn,
        )
        for leaf in constrained_leaves(params, opt_state)
    }

    def refit(node: Any) -> Any:
        if not isinstance(node, CBPState):
            return node
        old = flatten_with_paths(node.weight_scale)
        new = [scales[path].reshape(scale.shape) for path, scale in old]
        return node._replace(
            weight_scale=jax.tree.unflatten(jax.tree.structure(node.weight_scale), new)
        )

    return jax.tree.map(refit, opt_state, is_leaf=lambda node: isinstance(node, CBPState))


def float_dtype() -> jnp.dtype:
    """The dtype of sums and of the window: float64 under x64, else float32."""
    return jax.dtypes.canonicalize_dtype(float)


def find_states(opt_state: optax.OptState) -> list[CBPState]:
    """Every `CBPState` in an optimizer state, its NNX variables unwrapped; ValueError if there is none."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, CBPState))
    states = [_unwrap_variables(node) for node in nodes if isinstance(node, CBPState)]
    if not states:
        raise ValueError(
            "no CBPState in this optimizer state: give the state of an optimizer with cbp_jax.cbp or cbp_jax.cbp_sgd in it, "
            f"as its init or update returned it (got {type(opt_state).__name__})"
        )
    return states


def _unwrap_variables(tree: PyTree) -> PyTree:
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if is_variable(node) else node,
        tree,
        is_leaf=is_variable,
    )


def constrained_leaves(params: PyTree, opt_state: optax.OptState) -> list[ConstrainedLeaf]:
    """Pairs the constrained parameters with their constraint, scale and multiplier, in the order of the parameters."""
    weights = dict(flatten_with_paths(params))
    found: dict[Path, ConstrainedLeaf] = {}
    for state in find_states(opt_state):
        for leaf in pair_with_state(weights, state):
            if leaf.path in found:
                raise ValueError(
                    f"{path_string(leaf.path)!r} is constrained by two cbp links, {found[leaf.path].constraint.name!r} and "
                    f"{leaf.constraint.name!r}: give the links masks that do not overlap"
                )
            found[leaf.path] = leaf
    return [found[path] for path in weights if path in found]


def state_paths(state: CBPState) -> list[tuple[Path, Constraint | optax.MaskedNode]]:
    """All leaves that a state knows, with a `MaskedNode` for those it does not constrain."""
    return flatten_with_paths(
        state.constraints, is_leaf=lambda node: isinstance(node, Constraint | optax.MaskedNode)
    )


def pair_with_state(weights: dict[Path, Any], state: CBPState) -> list[ConstrainedLeaf]:
    """The leaves that a state constrains, in its order; ValueError names those that the parameters lack or that do not fit."""
    constrained = [
        (path, constraint)
        for path, constraint in state_paths(state)
        if isinstance(constraint, Constraint)
    ]
    missing = [path_string(path) for path, _ in constrained if path not in weights]
    if missing:
        raise ValueError(
            f"the parameters lack {len(missing)} of the {len(constrained)} leaves that the state constrains: "
            f"{', '.join(missing[:5])}. "
            f"They have {', '.join(map(path_string, list(weights)[:5])) or 'no leaves'}. "
            "Give the tree (or a tree with the same paths) that the optimizer's init was given."
        )
    multipliers, scales = jax.tree.leaves(state.multipliers), jax.tree.leaves(state.weight_scale)
    leaves = []
    for (path, constraint), multiplier, scale in zip(constrained, multipliers, scales, strict=True):
        weight = weights[path]
        if jnp.shape(weight) != multiplier.shape:
            raise ValueError(
                f"{path_string(path)!r} has shape {jnp.shape(weight)}, but the state was made for {multiplier.shape}: "
                "call the optimizer's init on these parameters"
            )
        if scale.ndim not in (0, weight.ndim):
            raise ValueError(
                f"the scale of {path_string(path)!r} has shape {scale.shape}, which does not fit weights of {weight.shape}: "
                "a state made under jax.vmap is used under jax.vmap"
            )
        leaves.append(ConstrainedLeaf(path, weight, constraint, scale, multiplier))
    return leaves
