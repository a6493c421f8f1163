"""CBP as a link of an optax chain."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from cbp_jax.arguments import (
    as_scalar,
    check_count,
    check_function,
    check_multiplier_dtype,
    check_number,
    check_optimizer,
    check_rate,
)
from cbp_jax.constraints import Constraint
from cbp_jax.lagrangian import constraint_sum
from cbp_jax.masking import Path, PyTree, flatten_with_paths
from cbp_jax.rules import ConstraintSpec, MaskSpec, compile_rules
from cbp_jax.scales import SCALE_FORM, ScaleFn
from cbp_jax.state import (
    CBPState,
    ConstrainedLeaf,
    float_dtype,
    is_rule,
    pair_all,
)
from cbp_jax.straight_through import check_axes, is_placeholder, measure
from cbp_jax.updates import add_to_updates

GrowthFn = Callable[[jax.Array], ArrayLike]


def cbp(
    constraint: ConstraintSpec,
    *,
    steps_per_epoch: int = 1000,
    patience: int = 20,
    multiplier_learning_rate: ArrayLike = 1e-4,
    multiplier_optimizer: optax.GradientTransformation | None = None,
    mask: MaskSpec = None,
    scale_axis: int | tuple[int, ...] | None = None,
    scale_fn: ScaleFn | None = None,
    initial_window: float = 1.0,
    window_growth: GrowthFn | None = None,
    multiplier_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Constrained backpropagation as a link of an optax chain: put it first.

    Every call adds the constraint's gradient to that of the loss, with the window `g` and one
    multiplier per weight:

        updates += multiplier * violation_grad(w, g)

    An epoch is `steps_per_epoch` calls. At its start the last epoch's summed Lagrangian,
    `value + sum(multiplier * violation)`, is compared with that of the epoch before. If it did not
    fall, or after `patience` epochs regardless, the window grows and the multipliers take one
    ascent step on the violation. A `value` that is missing or not finite makes its epoch not
    comparable: the comparison is skipped for that epoch and the next, patience still counts, and
    `CBPState.skipped_values` counts such steps. Calling (or compiling) `update` without `value`
    warns, unless `patience` is 1, which compares nothing.

    Args:
      constraint: "binary", "ternary", "one_bit_shift", "two_bit_shift", a `Constraint`, or a
        mapping from path patterns (`re.fullmatch`) to those or None. The first match wins; leaves
        that match nothing, or None, are unconstrained.
      steps_per_epoch: calls of `update` per epoch; under `optax.MultiSteps`, emitted updates.
      patience: epochs after which the window grows even if the Lagrangian still falls.
      multiplier_learning_rate: learning rate of Adam on the multipliers; ignored if
        `multiplier_optimizer` is given.
      multiplier_optimizer: a descending optax optimizer for the multipliers. Its gradient is minus
        the violation, so that it ascends. None is `optax.adam(multiplier_learning_rate)`.
        `optax.chain(optax.clip(3e-3), optax.sgd(1e-4 / 3e-3))` stores no moments: a violation of
        3e-3 or more, in the unit of the weights, moves a multiplier by 1e-4.
      mask: which leaves to constrain: a tree of bools, a prefix of one, or a callable from
        parameters to either, such as `cbp_jax.select`. None: floating leaves with at least two
        axes, except biases, scales, norm parameters, embeddings and position tables, recognized by
        their paths. Exclude the first and last layers yourself.
      scale_axis: axes to keep when scales are measured, one scale per index; -1 is per output
        channel of Flax kernels. None: one scale per tensor.
      scale_fn: a function (w, kept axes) -> scale, shape () or with kept dimensions. None: the mean
        absolute value. Give it to `cbp_jax.refit_scales` too.
      initial_window: `g` at the start, at least 1; infinity constrains every weight from the first
        step.
      window_growth: a function from `g`, a traced array, to the next one, such as
        `lambda g: jnp.where(g < 10, g + 1, 1.5 * g)`. None: g + 1 below 10, then g + 10. The window
        never shrinks: where the result is smaller, or NaN, it stays.
      multiplier_dtype: dtype of the multipliers and of their optimizer's moments. None:
        `promote_types(w.dtype, float32)`.

    Returns:
      A link with a `CBPState`. `init(params)` measures the scales, so call it after loading the
      pre-trained weights; `update(updates, state, params, value=loss)` needs `params`.

    Raises:
      ValueError: if the constraint is unknown or a number out of range; from `init` if a pattern
        matches nothing, or a leaf is zero throughout or its levels overflow; from `update` without
        `params`, with parameters or updates that do not fit the state, or if `value`, or what
        `window_growth` returns, is no number.
      TypeError: if `multiplier_optimizer` is no optax optimizer, or `scale_fn` or `window_growth`
        no function; from `init`, if a leaf to be constrained is not a floating-point array, or
        `scale_fn` does not return numbers; from `update`, if the state is that of another
        optimizer, or the updates are not floating-point arrays.

    Example:
      >>> import cbp_jax, jax, jax.numpy as jnp, optax
      >>> optimizer = optax.chain(cbp_jax.cbp(constraint="ternary"), optax.sgd(1e-3, momentum=0.9))
      >>> params = {"kernel": jnp.array([[0.5, -0.1], [0.3, 0.9]])}
      >>> state = optimizer.init(params)
      >>> loss_fn = lambda params: jnp.sum(params["kernel"] ** 2)
      >>> loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state))
      >>> updates, state = optimizer.update(grads, state, params, value=loss)
      >>> params = optax.apply_updates(params, updates)

    A gradient that is not finite reaches its own weights as it is. `optax.apply_if_finite` around
    the whole chain, `apply_if_finite(chain(cbp(...), sgd(...)), 3)`, skips such a step altogether,
    as if it had not been taken; after `cbp` it saves the weights too, but the step counts.
    Multipliers saturate below the largest number of their dtype.

    With `optax.inject_hyperparams`, arguments that are not numbers to schedule must be static:
    `static_args=("constraint", "mask", "steps_per_epoch", "patience", "scale_axis", "scale_fn",
    "multiplier_optimizer", "window_growth", "multiplier_dtype")`. With
    `optax.tree_utils.tree_map_params`, multipliers and their moments are parameters;
    `transform_non_params` gets `constraints` and `weight_scale` as whole trees.

    Reference: Kim and Jeong (2021), algorithm 1.
    """
    rules = compile_rules(constraint)
    steps_per_epoch = check_count("steps_per_epoch", steps_per_epoch)
    patience = check_count("patience", patience)
    initial_window = check_number("initial_window", initial_window, "a number of at least 1", 1)
    kept_axes = check_axes(scale_axis)
    check_function("scale_fn", scale_fn, SCALE_FORM)
    check_function("window_growth", window_growth, "window -> next window")
    multiplier_dtype = check_multiplier_dtype(multiplier_dtype)
    if multiplier_optimizer is not None:
        check_optimizer("multiplier_optimizer", multiplier_optimizer)
    else:
        multiplier_learning_rate = check_rate("multiplier_learning_rate", multiplier_learning_rate)
        if multiplier_dtype is not None and jnp.finfo(multiplier_dtype).smallest_normal > 1e-8:
            raise ValueError(
                f"multiplier_dtype {jnp.dtype(multiplier_dtype).name} cannot hold Adam's moments, "
                "which would divide 0 by 0: take bfloat16 or float32, or give a "
                "multiplier_optimizer without moments"
            )
    ascent = optax.with_extra_args_support(
        multiplier_optimizer or optax.adam(multiplier_learning_rate)
    )
    grow = _default_growth if window_growth is None else window_growth
    # Jitted, so that calls outside of jit compile once; here, so that the cache goes with the link.
    move = jax.jit(functools.partial(_move_multipliers, ascent), static_argnums=0, inline=True)

    def init_fn(params: PyTree) -> CBPState:
        constraints, scales = measure(rules, mask, params, kept_axes, scale_fn)
        multipliers = zero_multipliers(constraints, params, multiplier_dtype)
        return CBPState(
            count=jnp.zeros((), jnp.int32),
            step_in_epoch=jnp.zeros((), jnp.int32),
            started=jnp.zeros((), bool),
            constraints=constraints,
            multipliers=multipliers,
            weight_scale=scales,
            window=jnp.array(initial_window, float_dtype()),
            multiplier_opt_state=_shard_like(ascent.init(multipliers), multipliers),
            lagrangian_sum=jnp.zeros((), float_dtype()),
            lagrangian_lost=jnp.zeros((), float_dtype()),
            previous_sum=jnp.array(jnp.inf, float_dtype()),
            patience_used=jnp.zeros((), jnp.int32),
            skipped_values=jnp.zeros((), jnp.int32),
            multiplier_updates=jnp.zeros((), jnp.int32),
        )

    def update_fn(
        updates: PyTree,
        state: CBPState,
        params: PyTree | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CBPState]:
        del extra_args
        leaves = pair_all("cbp", params, state, CBPState)
        if value is None and not (isinstance(patience, int) and patience == 1):
            warnings.warn(
                "cbp's update got no value: without the Lagrangian the window grows by patience "
                "alone. Call optimizer.update(grads, state, params, value=loss); Flax's "
                "TrainState.apply_gradients does not pass it on",
                stacklevel=2,
            )
        state = _start_of_epoch(state, leaves, move, grow, patience)

        multipliers = jax.tree.leaves(state.multipliers)
        leaves = [
            leaf._replace(multiplier=multiplier)
            for leaf, multiplier in zip(leaves, multipliers, strict=True)
        ]
        total, window = (
            (None, state.window) if value is None else constraint_sum(leaves, state.window)
        )
        forces = [
            multiplier * leaf.constraint.violation_grad(leaf.weight, leaf.scale, window)
            for leaf, multiplier in zip(leaves, multipliers, strict=True)
        ]
        updates = add_to_updates(updates, leaves, forces)
        return updates, _end_of_step(state, value, total, steps_per_epoch)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _start_of_epoch(
    state: CBPState,
    leaves: list[ConstrainedLeaf],
    move: Callable[..., tuple[PyTree, optax.OptState]],
    grow: GrowthFn,
    patience: ArrayLike,
) -> CBPState:
    """If an epoch has just ended, judges it, on the weights after its last step.

    Grows the window and updates the multipliers if it is time to.
    """
    ended = (state.step_in_epoch == 0) & state.started
    used = state.patience_used + ended
    comparable = (state.lagrangian_sum > -jnp.inf) & (state.previous_sum > -jnp.inf)
    stalled = comparable & (state.lagrangian_sum >= state.previous_sum)
    grows = ended & (stalled | (used >= patience))
    expected = "window_growth must return the next window"
    grown = as_scalar(expected, grow(state.window), state.window.dtype)
    # A growth that is not one, or NaN, leaves the window as it is.
    window = jnp.where(grows & (grown > state.window), grown, state.window)

    ascends = grows | ~state.started
    constraints = tuple(leaf.constraint for leaf in leaves)
    weights = tuple((leaf.weight, leaf.scale) for leaf in leaves)
    with jax.named_scope("move_multipliers"):
        multipliers, opt_state = move(constraints, ascends, weights, window, state)
    previous_sum = jnp.where(ended, state.lagrangian_sum, state.previous_sum)
    return state._replace(
        started=jnp.ones((), bool),
        multipliers=multipliers,
        window=window,
        multiplier_opt_state=opt_state,
        lagrangian_sum=jnp.where(ended, 0, state.lagrangian_sum),
        lagrangian_lost=jnp.where(ended, 0, state.lagrangian_lost),
        previous_sum=jnp.where(grows, jnp.inf, previous_sum),
        patience_used=jnp.where(grows, 0, used),
        multiplier_updates=_increment_where(ascends, state.multiplier_updates),
    )


def _move_multipliers(
    ascent: optax.GradientTransformationExtraArgs,
    constraints: tuple[Constraint, ...],
    ascends: jax.Array,
    weights: tuple[tuple[jax.Array, jax.Array], ...],
    window: jax.Array,
    state: CBPState,
) -> tuple[PyTree, optax.OptState]:
    """Takes one ascent step on the violation, if it is time to; `weights` have their scales."""

    def ascend(
        carry: tuple[jax.Array, PyTree, optax.OptState],
    ) -> tuple[jax.Array, PyTree, optax.OptState]:
        _, multipliers, opt_state = carry
        old, treedef = jax.tree.leaves(multipliers), jax.tree.structure(multipliers)
        descent = [
            (-constraint.violation(w, scale, window)).astype(multiplier.dtype)
            for constraint, (w, scale), multiplier in zip(constraints, weights, old, strict=True)
        ]
        steps, new_opt_state = ascent.update(
            jax.tree.unflatten(treedef, descent), opt_state, multipliers
        )
        moved = jax.tree.map(_saturate, optax.apply_updates(multipliers, steps))
        new = (moved, new_opt_state)
        return jnp.zeros_like(ascends), *_cast_like(new, (multipliers, opt_state))

    # A loop of at most one turn: on a GPU some versions of XLA copy, in every step, everything that
    # goes through a conditional.
    carry = (ascends, state.multipliers, state.multiplier_opt_state)
    _, multipliers, opt_state = jax.lax.while_loop(lambda carry: carry[0], ascend, carry)
    return multipliers, opt_state


def _saturate(multiplier: jax.Array) -> jax.Array:
    """Bounds a multiplier so that twice it is finite, and 0 times it is 0 and not NaN."""
    most = float(jnp.finfo(multiplier.dtype).max) / 4
    return jnp.clip(multiplier, -most, most)


def _end_of_step(
    state: CBPState, value: ArrayLike | None, total: jax.Array | None, steps_per_epoch: ArrayLike
) -> CBPState:
    """Adds this step's Lagrangian, the loss plus the constraint's total, to the epoch's sum."""
    if value is None or total is None:  # they come together
        total = jnp.array(-jnp.inf, float_dtype())
    else:
        total = as_scalar("value must be the loss", value, float_dtype()) + total
    usable = jnp.isfinite(total)
    position = state.step_in_epoch + 1
    # Compensated (Kahan 1965): added one by one, 100,000 numbers are off by 1e-5 in float32, and a
    # smaller fall would be judged at random. Once -inf, the sum stays so until the epoch ends, and
    # _start_of_epoch does not compare it.
    term = jnp.where(usable, total, -jnp.inf) - state.lagrangian_lost
    new_sum = state.lagrangian_sum + term
    lost = (new_sum - state.lagrangian_sum) - term
    return state._replace(
        count=optax.safe_increment(state.count),
        step_in_epoch=jnp.where(position >= steps_per_epoch, 0, position),
        lagrangian_sum=new_sum,
        lagrangian_lost=jnp.where(jnp.isfinite(lost), lost, 0),
        skipped_values=_increment_where(~usable, state.skipped_values),
    )


def _increment_where(condition: jax.Array, count: jax.Array) -> jax.Array:
    return jnp.where(condition, optax.safe_increment(count), count)


def _default_growth(window: jax.Array) -> jax.Array:
    return jnp.where(window < 10, window + 1, window + 10)


def zero_multipliers(constraints: PyTree, params: PyTree, dtype: DTypeLike | None = None) -> PyTree:
    """Returns a multiplier of 0 per constrained weight, sharded like it.

    Args:
      constraints: of `straight_through.measure`.
      params: the parameters.
      dtype: None: `promote_types(w.dtype, float32)`.
    """
    if is_placeholder(params):
        return params  # optax's `tree_map_params` looks for it

    def zeros(rule: Constraint | optax.MaskedNode, node: PyTree) -> PyTree:
        def like(w: jax.Array) -> jax.Array:
            return _zeros_sharded_like(w, dtype or jnp.promote_types(w.dtype, jnp.float32))

        # A multiplier stays inside its NNX variable, which annotates the sharding.
        return jax.tree.map(like, node) if isinstance(rule, Constraint) else rule

    return jax.tree.map(zeros, constraints, params, is_leaf=is_rule)


def _zeros_sharded_like(w: jax.Array, dtype: DTypeLike) -> jax.Array:
    if isinstance(w, jax.core.Tracer):
        # Under jit plain zeros depend on nothing that has a sharding. These depend on w, as far as
        # XLA can tell.
        return (jnp.abs(w) < -1).astype(dtype)
    return jnp.zeros_like(w, dtype=dtype)


def _shard_like(opt_state: optax.OptState, multipliers: PyTree) -> optax.OptState:
    """Under `jit`, shards each array with a multiplier's path and shape like that multiplier."""
    by_path = dict(flatten_with_paths(multipliers))

    def align(path: Path, leaf: Any) -> Any:
        for start in range(len(path) + 1):
            zeros = by_path.get(path[start:])
            if isinstance(zeros, jax.core.Tracer) and zeros.shape == jnp.shape(leaf):
                return leaf + zeros.astype(leaf.dtype)
        return leaf

    leaves = [align(path, leaf) for path, leaf in flatten_with_paths(opt_state)]
    return jax.tree.unflatten(jax.tree.structure(opt_state), leaves)


def _cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts the leaves to the dtypes of others, as a loop needs its carry to keep its dtypes."""
    return jax.tree.map(lambda leaf, model: jnp.asarray(leaf, jnp.asarray(model).dtype), tree, like)
