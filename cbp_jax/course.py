"""CBP by the number of steps: an optimizer's constrained weights are on their levels in time."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cbp_jax.arguments import LARGEST, check_count, check_function, check_number, check_optimizer
from cbp_jax.masking import PyTree
from cbp_jax.rules import ConstraintSpec, MaskSpec, compile_rules
from cbp_jax.scales import SCALE_FORM, ScaleFn
from cbp_jax.state import ClosingState, ConstrainedLeaf, State, float_dtype, pair_all
from cbp_jax.straight_through import check_axes, measure
from cbp_jax.transform import zero_multipliers
from cbp_jax.updates import add_to_updates, replace_updates, updates_of

_DECAY = 0.95  # of the running mean of the squared gradients


def closing(
    inner: optax.GradientTransformation,
    constraint: ConstraintSpec,
    total_steps: int,
    *,
    closes_at: float = 0.95,
    strength: float = 10.0,
    mask: MaskSpec = None,
    scale_axis: int | tuple[int, ...] | None = None,
    scale_fn: ScaleFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """CBP around any optimizer, with a window that closes by the number of steps.

    The paper's rule, `cbp_jax.cbp`, needs a multiplier rate in the unit of the loss's gradient, and
    epochs and patience such that the window closes in time. This one needs the number of steps.
    With the progress `p`, which rises from 0 to 1 over the first `closes_at * total_steps` calls,
    and the running root mean square `r` of the leaf's gradient:

        window        g = 1 / (1 - p)
        multiplier    += strength * (change of p^3) * violation(w, g) / scale
        updates       = inner(gradient + r * multiplier * violation_grad(w, g))

    So a multiplier has no unit. It grows slowly at first, while weights must be free to change
    their level, and fast at the end. Once the window is infinite, constrained weights are put on
    their levels, `w = q(w)`, and stay there, while the other parameters and the batch statistics
    settle.

    Gradients beyond 1e-19 to 1e19, whose squares leave float32, leave `r` at 0: their constraint
    acts at the end only.

    Args:
      inner: the optimizer of all parameters, such as `optax.adamw(schedule)`, without links of this
        library in it. Clip before, not inside, where the clip would see the constraint's gradient
        too: `optax.chain(optax.clip_by_global_norm(1.0), closing(...))`. No link may follow, for it
        would change the step that puts weights on their levels. To survive gradients that are not
        finite, give `optax.apply_if_finite(optax.adamw(schedule), 3)`: around `closing` it would
        put off the end of the course by each step that it skips.
      constraint: as in `cbp_jax.cbp`.
      total_steps: calls of `update` in the whole run, at least 3 to end on the levels; under
        `optax.MultiSteps`, emitted updates. A run that goes on with another number starts its
        course anew from its share of that number.
      closes_at: share of the run after which all constrained weights are on their levels.
      strength: the multiplier that a weight ends with whose violation is one scale all along.
      mask: as in `cbp_jax.cbp`.
      scale_axis: as in `cbp_jax.cbp`.
      scale_fn: as in `cbp_jax.cbp`.

    Returns:
      An optimizer with a `ClosingState`; `init(params)` measures the scales, so call it after
      loading the pre-trained weights; `update(updates, state, params)` passes further arguments on
      to `inner`, and needs no `value`.

    Raises:
      ValueError: as `cbp_jax.cbp` does; if `closes_at` is not in (0, 1] or `strength` negative;
        from `init`, if `inner` has a link of this library in it.
      TypeError: as `cbp_jax.cbp` does, for `inner` as for its `multiplier_optimizer`.

    Example:
      >>> import cbp_jax, jax, jax.numpy as jnp, optax
      >>> optimizer = cbp_jax.closing(optax.adam(1e-2), "ternary", total_steps=100)
      >>> params = {"kernel": jnp.array([[0.5, -0.1], [0.3, 0.9]])}
      >>> state = optimizer.init(params)
      >>> loss_fn = lambda params: jnp.sum((params["kernel"] - 0.4) ** 2)
      >>> for _ in range(100):
      ...     grads = jax.grad(loss_fn)(cbp_jax.quantize(params, state))
      ...     updates, state = optimizer.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(cbp_jax.constraint_failure_score(params, state))
      0.0

    Reference: Kim and Jeong (2021) for multipliers and window; the course is this project's, and
      `docs/methods.md` compares it with other methods.
    """
    rules, kept_axes = compile_rules(constraint), check_axes(scale_axis)
    check_function("scale_fn", scale_fn, SCALE_FORM)
    total_steps = check_count("total_steps", total_steps)
    share = "a share of the run, in (0, 1]"
    closes_at = check_number("closes_at", closes_at, share, 0, 1, open_at="low")
    strength = check_number("strength", strength, "a number of at least 0", 0, LARGEST)
    check_optimizer("inner", inner)
    optimizer = optax.with_extra_args_support(inner)

    def init_fn(params: PyTree) -> ClosingState:
        constraints, scales = measure(rules, mask, params, kept_axes, scale_fn)
        inner_state = optimizer.init(params)
        nodes = jax.tree.leaves(inner_state, is_leaf=lambda node: isinstance(node, State))
        if any(isinstance(node, State) for node in nodes):
            raise ValueError(
                "the optimizer inside closing has a link of cbp_jax in it, which quantize would "
                "not find: give closing a mapping of patterns to constraints instead"
            )
        return ClosingState(
            count=jnp.zeros((), jnp.int32),
            constraints=constraints,
            multipliers=zero_multipliers(constraints, params),
            weight_scale=scales,
            window=jnp.ones((), float_dtype()),
            mean_square=jax.tree.map(lambda scale: jnp.zeros_like(scale, shape=()), scales),
            inner=inner_state,
        )

    def update_fn(
        updates: PyTree, state: ClosingState, params: PyTree | None = None, **extra_args: Any
    ) -> tuple[PyTree, ClosingState]:
        leaves = pair_all("closing", params, state, ClosingState)
        # Two calls short, so that two put weights on their levels: the first sum may round.
        steps = jnp.maximum(jnp.asarray(closes_at * total_steps, float_dtype()) - 2, 1)
        later = optax.safe_increment(state.count)
        p, after = (jnp.minimum(count / steps, 1) for count in (state.count, later))
        window, closed = 1 / (1 - p), p >= 1
        # Of p^3, without cancellation; not `p**2`, which JAX compiles anew in calls outside of jit.
        rise = (after - p) * (after * after + after * p + p * p)
        bias_correction = -jnp.expm1(math.log(_DECAY) * later)

        squares, multipliers, forces = [], [], []
        old = (jax.tree.leaves(tree) for tree in (state.mean_square, state.multipliers))
        grads = updates_of(leaves, updates)
        for leaf, grad, mean_square, multiplier in zip(leaves, grads, *old, strict=True):
            square = _running_mean(mean_square, grad)
            size = jnp.sqrt(square / bias_correction)
            violation = leaf.constraint.violation(leaf.weight, leaf.scale, window)
            grown = strength * rise * violation / jnp.where(leaf.scale > 0, leaf.scale, 1)
            multiplier += grown.astype(multiplier.dtype)
            gradient = leaf.constraint.violation_grad(leaf.weight, leaf.scale, window)
            squares.append(square)
            multipliers.append(multiplier)
            forces.append(size * multiplier * gradient)

        updates = add_to_updates(updates, leaves, forces)
        updates, inner_state = optimizer.update(updates, state.inner, params, **extra_args)
        updates = _put_on_levels(updates, leaves, closed)
        return updates, state._replace(
            count=later,
            multipliers=_unflatten_like(state.multipliers, multipliers),
            window=jnp.asarray(window, state.window.dtype),
            mean_square=_unflatten_like(state.mean_square, squares),
            inner=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _running_mean(mean_square: jax.Array, gradient: jax.Array) -> jax.Array:
    """The running mean of the squared gradient; a gradient that is not finite does not count."""
    square = jnp.mean(jnp.square(gradient.astype(mean_square.dtype)))
    new = _DECAY * mean_square + (1 - _DECAY) * square
    return jnp.where(jnp.isfinite(square), new, mean_square)


def _put_on_levels(updates: PyTree, leaves: list[ConstrainedLeaf], closed: jax.Array) -> PyTree:
    """Changes the updates so that constrained weights go to their levels, once it has closed."""
    new = []
    for leaf, step in zip(leaves, updates_of(leaves, updates), strict=True):
        to_level = leaf.constraint.quantize(leaf.weight, leaf.scale) - leaf.weight
        new.append(jnp.where(closed & (leaf.scale > 0), to_level.astype(step.dtype), step))
    return replace_updates(updates, leaves, new)


def _unflatten_like(tree: PyTree, leaves: list[jax.Array]) -> PyTree:
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)
