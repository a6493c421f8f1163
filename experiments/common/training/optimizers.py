"""The optimizers of the long runs, from their configs."""

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
    config: ml_collections.ConfigDict, steps_per_epoch: int, constrained: str
) -> optax.GradientTransformationExtraArgs:
    """The paper's recipe, or one of the two it is compared with.

    Args:
      config: of `settings.long_experiment`. `method` is "cbp"; "no_window", all weights constrained
        from the start; or "ste", the straight-through estimator alone. In the latter two no window
        tells when to lower the learning rate, so it falls along a cosine; what the paper did there
        it does not say.
      steps_per_epoch: of the schedule.
      constrained: pattern of the paths of the constrained parameters.

    Raises:
      ValueError: if the method is not known.
    """
    options = multiplier_options(config) | {"lr_decay": config.lr_decay}
    if config.method == "no_window":
        options |= {"initial_window": float("inf"), "lr_decay": 1.0}
    elif config.method == "ste":
        options |= {"multiplier_optimizer": optax.set_to_zero(), "lr_decay": 1.0}
    elif config.method != "cbp":
        raise ValueError(f"--config.method={config.method!r} is none of {', '.join(METHODS)}")
    return cbp_jax.cbp_sgd(
        learning_rate(config, steps_per_epoch),
        config.constraint,
        steps_per_epoch=steps_per_epoch,
        patience=config.patience,
        weight_decay=config.weight_decay,
        lr_decay_window=config.lr_decay_window,
        window_growth=window_growth(config.window_factor),
        mask=cbp_jax.select(include=constrained),
        **options,
    )


def multiplier_options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What the config says about the multipliers, as arguments of `cbp_jax.cbp_sgd`.

    The rule "capped" keeps no moments: `multiplier += rate * min(violation / 0.003, 1)`, so
    multipliers move as far as under Adam where the constraint is not met, and come to rest where it
    is.

    Raises:
      ValueError: if the rule is not known.
    """
    rate = config.multiplier_learning_rate
    rules = {
        "adam": optax.adam(rate),
        "capped": optax.chain(optax.clip(_CAP), optax.sgd(rate / _CAP)),
    }
    if config.multiplier_rule not in rules:
        raise ValueError(
            f"--config.multiplier_rule={config.multiplier_rule!r} is none of {', '.join(rules)}"
        )
    return {
        "multiplier_optimizer": rules[config.multiplier_rule],
        "multiplier_dtype": config.multiplier_dtype,
    }


def window_growth(factor: float) -> Callable[[jax.Array], jax.Array] | None:
    """The window grows by 1 below 10 and by the factor from there; a factor of 0 is the paper's rule."""
    return (lambda g: jnp.where(g < 10, g + 1, factor * g)) if factor else None


def pretraining(
    config: ml_collections.ConfigDict, steps_per_epoch: int
) -> optax.GradientTransformationExtraArgs:
    """Full precision: momentum, weight decay on kernels, a learning rate that falls to 0 along a cosine."""
    decay = optax.add_decayed_weights(
        config.weight_decay, mask=lambda params: jax.tree.map(lambda w: w.ndim >= 2, params)
    )
    sgd = optax.sgd(learning_rate(config, steps_per_epoch), momentum=0.9)
    return optax.with_extra_args_support(optax.chain(decay, sgd))


def learning_rate(config: ml_collections.ConfigDict, steps_per_epoch: int) -> optax.Schedule:
    """A function of the step, scaled to the batch; what CBP takes off as its window closes comes on top."""
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
    return (
        optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
        if warmup
        else after
    )
