"""The parts of a run's optimizer, from its config: inner optimizer, schedule, multipliers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import cbp_jax

_CAP = 3e-3  # of the violation under the multiplier rule "capped", in the unit of the weights
_PROPORTIONAL = 3.0  # of the rule "pi"


def clip(config: ml_collections.FrozenConfigDict) -> optax.GradientTransformation:
    """Returns the clipping of the loss's gradient in post-training.

    Of each element to ±1 under "sgd", as in the paper; of the global norm under "adamw".
    """
    return optax.clip(1.0) if config.optimizer == "sgd" else _clip_norm(config)


def inner(
    config: ml_collections.FrozenConfigDict, steps_per_epoch: int
) -> optax.GradientTransformation:
    """Returns `config.optimizer` along its schedule, with weight decay on kernels.

    Under "sgd" the decay is added to the gradient, and momentum is 0.9; under "adamw" it is
    decoupled. The state has the rate of the last step as `learning_rate`.
    """
    schedule = learning_rate(config, steps_per_epoch)
    if config.optimizer == "sgd":
        sgd = optax.inject_hyperparams(optax.sgd, static_args="momentum")
        return optax.chain(
            optax.add_decayed_weights(config.weight_decay, mask=_kernels),
            sgd(schedule, momentum=0.9),
        )

    def adamw(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
        return optax.adamw(
            learning_rate, b2=config.b2, weight_decay=config.weight_decay, mask=_kernels
        )

    return optax.inject_hyperparams(adamw)(schedule)


def multiplier_options(config: ml_collections.FrozenConfigDict) -> dict[str, Any]:
    """Returns the config's settings of the multipliers, as arguments of `cbp_jax.cbp_sgd`.

    The rule "capped" keeps no moments: `multiplier += rate * min(violation / 0.003, 1)`, so
    multipliers move as far as under Adam where the constraint is not met, and come to rest where it
    is. "pi" adds a part in proportion to the violation of the moment, as an augmented Lagrangian
    does, to the sum of violations: `multiplier = rate / 0.003 * (sum + 3 * violation)`.
    """
    rate = config.multiplier_learning_rate
    rules = {
        "adam": optax.adam(rate),
        "capped": optax.chain(optax.clip(_CAP), optax.sgd(rate / _CAP)),
        "pi": optax.chain(_proportional_integral(_PROPORTIONAL), optax.sgd(rate / _CAP)),
    }
    return {
        "multiplier_optimizer": rules[config.multiplier_rule],
        "multiplier_dtype": config.multiplier_dtype,
    }


def scale_options(config: ml_collections.FrozenConfigDict) -> dict[str, Any]:
    """Returns the config's settings of the scales, as arguments of `cbp_jax.cbp` and its kin."""
    return {
        "scale_axis": -1 if config.scale_per_output else None,
        "scale_fn": cbp_jax.float16_scale if config.scale_dtype == "float16" else None,
    }


def window_growth(factor: float) -> Callable[[jax.Array], jax.Array] | None:
    """Returns growth by 1 below 10 and by the factor from there; 0 stands for the paper's rule."""
    return (lambda g: jnp.where(g < 10, g + 1, factor * g)) if factor else None


def pretraining(
    config: ml_collections.FrozenConfigDict, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run in full precision from random weights."""
    optimizer = inner(config, steps_per_epoch)
    if config.optimizer == "adamw":
        optimizer = optax.chain(_clip_norm(config), optimizer)
    return optax.with_extra_args_support(optimizer)


def learning_rate(config: ml_collections.FrozenConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the rate by step, scaled to the batch; `cbp_sgd` lowers it as the window closes.

    Of itself it is constant under "cbp", and falls to 0 along a cosine elsewhere: in pre-training,
    and where no window lowers it. The paper does not say what it did there.
    """
    pretrain = config.phase == "pretrain"
    epochs = config.pretrain_epochs if pretrain else config.epochs
    ratio = config.batch_size / config.base_batch_size
    peak = (config.pretrain_learning_rate if pretrain else config.learning_rate) * ratio
    warmup = config.warmup_steps
    # A network that starts from random weights is warmed up whatever the batch.
    if not warmup and (ratio > 1 or pretrain):
        warmup = min(config.warmup_epochs, epochs) * steps_per_epoch
    steps = max(epochs * steps_per_epoch - warmup, 1)
    own = "constant" if config.method == "cbp" and not pretrain else "cosine"
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, steps),
        "linear": optax.linear_schedule(peak, 0.0, steps),
    }[config.schedule or own]
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _proportional_integral(proportional: float) -> optax.GradientTransformation:
    """Sums of its updates are those of what it gets, plus `proportional` times the last of these.

    Reference: Sohrabi et al. (2024), "On PI Controllers for Updating Lagrange Multipliers in
      Constrained Optimization", without their smoothing.
    """

    def init_fn(params: Any) -> optax.TraceState:
        return optax.TraceState(optax.tree.zeros_like(params))

    def update_fn(
        updates: Any, state: optax.TraceState, params: Any = None
    ) -> tuple[Any, optax.TraceState]:
        del params
        new = jax.tree.map(lambda e, last: e + proportional * (e - last), updates, state.trace)
        return new, optax.TraceState(updates)

    return optax.GradientTransformation(init_fn, update_fn)


def _clip_norm(config: ml_collections.FrozenConfigDict) -> optax.GradientTransformation:
    return optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda w: w.ndim >= 2, params)
