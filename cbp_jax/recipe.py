"""The paper's whole recipe as one optimizer, and a link that keeps parameters in a box."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from cbp_jax.arguments import LARGEST, check_number, check_rate, check_update, check_weight, shown
from cbp_jax.constraints import Constraint
from cbp_jax.masking import PyTree, flatten_with_paths, is_floating, path_string, resolve_mask
from cbp_jax.rules import ConstraintSpec, MaskSpec
from cbp_jax.scales import ScaleFn
from cbp_jax.state import CBPState, check_state, float_dtype, is_rule
from cbp_jax.transform import GrowthFn, cbp

_BOUND = ("positive or None", 0)  # what is expected, and the lowest


class CBPSGDState(NamedTuple):
    """State of `cbp_sgd`."""

    cbp: CBPState
    sgd: optax.OptState
    # shape=(), float32, or float64 under x64: the rate that the last call applied, including the
    # decay by the window; before the first call, the rate that it will apply
    learning_rate: jax.Array


def cbp_sgd(
    learning_rate: optax.ScalarOrSchedule,
    constraint: ConstraintSpec,
    *,
    steps_per_epoch: int = 1000,
    patience: int = 20,
    multiplier_learning_rate: ArrayLike = 1e-4,
    momentum: float | None = 0.9,
    weight_decay: float = 1e-4,
    gradient_clip: float | None = 1.0,
    weight_bound: float | None = 1.0,
    lr_decay: float = 0.1,
    lr_decay_window: float = 20,
    mask: MaskSpec = None,
    decay_mask: MaskSpec = None,
    multiplier_optimizer: optax.GradientTransformation | None = None,
    scale_axis: int | tuple[int, ...] | None = None,
    scale_fn: ScaleFn | None = None,
    initial_window: float = 1.0,
    window_growth: GrowthFn | None = None,
    multiplier_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The paper's whole recipe, packaged as one optimizer like `optax.adamw`.

    With the window `g`, the learning rate `lr`, and `clip` to ±`gradient_clip` elementwise:

        gradient = clip(gradient + multiplier * violation_grad(w, g)) + weight_decay * w
        velocity = momentum * velocity + gradient
        w        = w - lr * (lr_decay if g >= lr_decay_window else 1) * velocity

    By default only kernels decay. After the step, constrained weights are clamped to
    ±`weight_bound`.

    Args:
      learning_rate: a number, or a schedule from steps to rates.
      constraint: as in `cbp_jax.cbp`.
      steps_per_epoch: as in `cbp_jax.cbp`.
      patience: as in `cbp_jax.cbp`.
      multiplier_learning_rate: as in `cbp_jax.cbp`.
      momentum: decay of the momentum; None is plain gradient descent.
      weight_decay: factor of the weights that is added to the gradient after clipping.
      gradient_clip: bound on the absolute value of each gradient element; None does not clip.
      weight_bound: bound on the absolute value of each constrained weight; None does not clamp.
      lr_decay: factor on the learning rate once the window has reached `lr_decay_window`.
      lr_decay_window: the window from which the learning rate is decayed; the window that counts is
        the one after this call's epoch boundary.
      mask: as in `cbp_jax.cbp`.
      decay_mask: which leaves decay, in the form of `mask`. None: leaves with at least two axes.
        Static under `optax.inject_hyperparams`.
      multiplier_optimizer: as in `cbp_jax.cbp`.
      scale_axis: as in `cbp_jax.cbp`.
      scale_fn: as in `cbp_jax.cbp`.
      initial_window: as in `cbp_jax.cbp`.
      window_growth: as in `cbp_jax.cbp`.
      multiplier_dtype: as in `cbp_jax.cbp`.

    Returns:
      An optimizer used like `cbp_jax.cbp`: call `init` after loading the pre-trained weights, and
      `update` with `params` and `value`. `optax.tree_utils.tree_get(state, "learning_rate")` is the
      rate that the last call applied, for logs.

    Raises:
      ValueError: as `cbp_jax.cbp` does, also for the numbers here; or if `weight_bound` or
        `gradient_clip` is not positive.
      TypeError: as `cbp_jax.cbp` does.

    Example:
      >>> import cbp_jax, jax.numpy as jnp
      >>> optimizer = cbp_jax.cbp_sgd(1e-3, "binary", steps_per_epoch=100)
      >>> state = optimizer.init({"kernel": jnp.array([[0.5, -0.1]])})
      >>> print(cbp_jax.window(state))
      1.0

    Reference: Kim and Jeong (2021), section 4 and algorithm 1.
    """
    link = cbp(
        constraint,
        steps_per_epoch=steps_per_epoch,
        patience=patience,
        multiplier_learning_rate=multiplier_learning_rate,
        multiplier_optimizer=multiplier_optimizer,
        mask=mask,
        scale_axis=scale_axis,
        scale_fn=scale_fn,
        initial_window=initial_window,
        window_growth=window_growth,
        multiplier_dtype=multiplier_dtype,
    )
    if weight_bound is not None:
        weight_bound = check_number("weight_bound", weight_bound, *_BOUND, open_at="low")
    if gradient_clip is not None:
        gradient_clip = check_number("gradient_clip", gradient_clip, *_BOUND, open_at="low")
    if momentum is not None:
        momentum = check_number("momentum", momentum, "None or a number from 0 to 1", 0, 1)
    factor = "a number of at least 0"
    weight_decay = check_number("weight_decay", weight_decay, factor, 0, LARGEST)
    lr_decay = check_number("lr_decay", lr_decay, factor, 0, LARGEST)
    lr_decay_window = check_number("lr_decay_window", lr_decay_window, "a number", -math.inf)
    learning_rate = check_rate("learning_rate", learning_rate)

    def decays(params: PyTree) -> PyTree:
        if decay_mask is None:
            return _at_least_two_axes(params)
        return jax.tree.unflatten(jax.tree.structure(params), resolve_mask(decay_mask, params))

    sgd = optax.chain(
        optax.identity() if gradient_clip is None else optax.clip(gradient_clip),
        optax.add_decayed_weights(weight_decay, decays),
        optax.identity() if momentum is None else optax.trace(momentum),
    )

    def current_rate(count: jax.Array, window: jax.Array) -> jax.Array:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        decay = jnp.where(window >= lr_decay_window, lr_decay, 1.0)
        return jnp.asarray(rate * decay, float_dtype())

    def init_fn(params: PyTree) -> CBPSGDState:
        cbp_state = link.init(params)
        return CBPSGDState(
            cbp=cbp_state,
            sgd=sgd.init(params),
            learning_rate=current_rate(cbp_state.count, cbp_state.window),
        )

    def update_fn(
        updates: PyTree,
        state: CBPSGDState,
        params: PyTree | None = None,
        *,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[PyTree, CBPSGDState]:
        del extra_args
        check_state("cbp_sgd", state, CBPSGDState)
        updates, cbp_state = link.update(updates, state.cbp, params, value=value)
        updates, sgd_state = sgd.update(updates, state.sgd, params)
        rate = current_rate(state.cbp.count, cbp_state.window)
        updates = jax.tree.map(lambda u: u * (-rate).astype(u.dtype), updates)
        if weight_bound is not None:
            constrained = jax.tree.map(
                lambda node: isinstance(node, Constraint),
                cbp_state.constraints,
                is_leaf=is_rule,
            )
            updates, _ = keep_params_in_box(-weight_bound, weight_bound, constrained).update(
                updates, optax.EmptyState(), params
            )
        return updates, CBPSGDState(cbp=cbp_state, sgd=sgd_state, learning_rate=rate)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at_least_two_axes(params: PyTree) -> PyTree:
    return jax.tree.map(lambda w: is_floating(w) and len(w.shape) >= 2, params)


def keep_params_in_box(
    lower: ArrayLike, upper: ArrayLike, mask: MaskSpec = None
) -> optax.GradientTransformation:
    """Changes updates so that the updated parameters stay in a box; use it as the last link.

    Where `params + updates` leaves `[lower, upper]` the update is changed so that the parameter
    lands on the nearer bound, rounded inward; elsewhere it is unchanged.

    Args:
      lower: the lower bound, a number or an array of shape ().
      upper: the upper bound, likewise.
      mask: which leaves to keep inside: a tree of bools, a prefix of one, or a callable from
        parameters to either. None: all floating leaves.

    Returns:
      A stateless link whose `update` needs `params`.

    Raises:
      ValueError: if a bound is no number, or the lower one not below the upper one; from `update`,
        without `params`, or if the updates do not fit them.
      TypeError: from `update`, if a leaf to be kept inside is not a floating-point array.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> link = cbp_jax.keep_params_in_box(-1.0, 1.0)
      >>> params = jnp.array([0.5, -0.5])
      >>> updates, _ = link.update(jnp.array([0.75, 0.75]), link.init(params), params)
      >>> print(params + updates)
      [1.   0.25]

    Reference: the code of Kim and Jeong (2021), which clamps constrained weights to [-1, 1] after
      each step.
    """
    lower = check_number("the lower bound", lower, "a number", -math.inf)
    upper = check_number("the upper bound", upper, "a number", -math.inf)
    if isinstance(lower, float) and isinstance(upper, float) and not lower < upper:
        raise ValueError(
            f"the lower bound must be below the upper one, got {shown(lower)} and {shown(upper)}"
        )

    def init_fn(params: PyTree) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: PyTree, state: optax.EmptyState, params: PyTree | None = None
    ) -> tuple[PyTree, optax.EmptyState]:
        if params is None:
            raise ValueError(
                "keep_params_in_box needs the parameters: "
                "call optimizer.update(grads, state, params)"
            )
        weights, steps = jax.tree.leaves(params), jax.tree.leaves(updates)
        if len(weights) != len(steps):
            raise ValueError(
                f"there are {len(weights)} parameters but {len(steps)} updates: "
                "give trees of the same structure"
            )
        flags = list(map(is_floating, weights)) if mask is None else resolve_mask(mask, params)
        for (path, w), u, flag in zip(flatten_with_paths(params), steps, flags, strict=True):
            if flag:
                check_weight(path_string(path), w)
                check_update(path_string(path), u, w.shape)
        clamped = [
            _clamp_update(w, u, lower, upper) if flag else u
            for w, u, flag in zip(weights, steps, flags, strict=True)
        ]
        return jax.tree.unflatten(jax.tree.structure(updates), clamped), state

    return optax.GradientTransformation(init_fn, update_fn)


def _clamp_update(w: jax.Array, update: jax.Array, lower: ArrayLike, upper: ArrayLike) -> jax.Array:
    low, high = _round_inward(lower, w.dtype, math.inf), _round_inward(upper, w.dtype, -math.inf)
    wide = jnp.promote_types(jnp.promote_types(w.dtype, update.dtype), jnp.float32)
    to_low, to_high = (
        (bound.astype(wide) - w.astype(wide)).astype(update.dtype) for bound in (low, high)
    )
    inside = jnp.where(w + update > high, to_high, jnp.where(w + update < low, to_low, update))
    # Rounding may have put either difference outside, by less than one step of its precision.
    if jnp.finfo(inside.dtype).bits < 32:
        down, up = (
            jnp.nextafter(inside, jnp.asarray(end, inside.dtype)) for end in (-math.inf, math.inf)
        )
    else:  # one step or two, for less arithmetic than nextafter takes
        step = jnp.abs(inside) * jnp.finfo(inside.dtype).eps
        down, up = inside - step, inside + step
    return jnp.where(w + inside > high, down, jnp.where(w + inside < low, up, inside))


def _round_inward(bound: ArrayLike, dtype: jnp.dtype, inward: float) -> jax.Array:
    """Rounds a bound to a dtype, towards `inward`, which is infinite."""
    exact = jnp.asarray(bound, jnp.promote_types(dtype, jnp.float32))
    rounded = exact.astype(dtype)
    widened = rounded.astype(exact.dtype)
    outside = widened < exact if inward > 0 else widened > exact
    return jnp.where(outside, jnp.nextafter(rounded, jnp.asarray(inward, dtype)), rounded)
