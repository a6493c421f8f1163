"""The optimizers of a run, from its config."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

import cbp_jax

METHODS = ("cbp", "no_window", "ste")
_CAP = 3e-3  # of the violation under the multiplier rule "capped", in the unit of the weights


def post_training(
    config: ml_collections.FrozenConfigDict, steps_per_epoch: int, constrained: str
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of `config.method`.

    "cbp" is the paper's recipe; "no_window" constrains all weights from the start; "ste" is the
    straight-through estimator alone. The last two have no window that lowers the learning rate, so
    it falls along a cosine; the paper does not say what it did there.

    Args:
      config: of `settle`.
      steps_per_epoch: steps of an epoch of the schedule.
      constrained: pattern of the paths of the constrained parameters.
    """
    options = multiplier_options(config)
    if config.method == "no_window":
        options["initial_window"] = float("inf")
    elif config.method == "ste":
        options["multiplier_optimizer"] = optax.set_to_zero()
    return cbp_jax.cbp_sgd(
        learning_rate(config, steps_per_epoch),
        config.constraint,
        steps_per_epoch=steps_per_epoch,
        patience=config.patience,
        weight_decay=config.weight_decay,
        lr_decay=config.lr_decay if config.method == "cbp" else 1.0,
        lr_decay_window=config.lr_decay_window,
        window_growth=window_growth(config.window_factor),
        mask=cbp_jax.select(include=constrained),
        **options,
    )


def multiplier_options(config: ml_collections.FrozenConfigDict) -> dict[str, Any]:
    """Returns the config's settings of the multipliers, as arguments of `cbp_jax.cbp_sgd`.

    The rule "capped" keeps no moments: `multiplier += rate * min(violation / 0.003, 1)`, so
    multipliers move as far as under Adam where the constraint is not met, and come to rest where it
    is.
    """
    rate = config.multiplier_learning_rate
    rules = {
        "adam": optax.adam(rate),
        "capped": optax.chain(optax.clip(_CAP), optax.sgd(rate / _CAP)),
    }
    return {
        "multiplier_optimizer": rules[config.multiplier_rule],
        "multiplier_dtype": config.multiplier_dtype,
    }


def window_growth(factor: float) -> Callable[[jax.Array], jax.Array] | None:
    """Returns growth by 1 below 10 and by the factor from there; 0 stands for the paper's rule."""
    return (lambda g: jnp.where(g < 10, g + 1, factor * g)) if factor else None


def pretraining(
    config: ml_collections.FrozenConfigDict, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """Returns SGD with momentum, weight decay on kernels, and a rate that falls along a cosine."""
    sgd = optax.inject_hyperparams(optax.sgd, static_args="momentum")  # keeps the rate in its state
    optimizer = optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=_kernels),
        sgd(learning_rate(config, steps_per_epoch), momentum=0.9),
    )
    return optax.with_extra_args_support(optimizer)


def learning_rate(config: ml_collections.FrozenConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """Returns the rate by step, scaled to the batch; `cbp_sgd` lowers it as the window closes."""
    pretrain = config.phase == "pretrain"
    epochs = config.pretrain_epochs if pretrain else config.epochs
    ratio = config.batch_size / config.base_batch_size
    peak = (config.pretrain_learning_rate if pretrain else config.learning_rate) * ratio
    # A network that starts from random weights is warmed up whatever the batch.
    warmup = min(config.warmup_epochs, epochs) * steps_per_epoch if ratio > 1 or pretrain else 0
    if pretrain or config.method != "cbp":
        after = optax.cosine_decay_schedule(peak, max(epochs * steps_per_epoch - warmup, 1))
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda w: w.ndim >= 2, params)
