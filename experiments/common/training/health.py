"""Whether a state is sound: its numbers finite, its layers alive, its multipliers bounded."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

import cbp_jax
from common.training.metrics import evaluated_weights
from common.training.setup import Setup
from common.training.step import TrainState

PyTree = Any
# Those of sound runs are of the order of 1, as are the gradients that they are added to.
_LARGE_MULTIPLIER = 1e4
_SHOWN = 3


def check_finite(state: TrainState, sound: int) -> None:
    """Checks that a state may be measured and saved; all hosts call it.

    Args:
      state: after any step.
      sound: the last step at which everything is known to be finite.

    Raises:
      FloatingPointError: if a number is not finite; the error names the arrays.
    """
    flags = jax.tree.leaves_with_path(jax.device_get(_not_finite(state)))
    names = [_name(path[1:]) for path, flag in flags if flag]
    if not names:
        return
    shown, step = ", ".join(names[:_SHOWN]), int(state.step)
    if len(names) > _SHOWN:
        shown += f" and {len(names) - _SHOWN} more"
    if step == sound:
        raise FloatingPointError(
            f"not finite before the first step: {shown}; check the weights that "
            "--config.pretrained names"
        )
    raise FloatingPointError(
        f"not finite at step {step:,}: {shown}; all was finite at step {sound:,}, and the "
        "checkpoints are from before. Lower --config.learning_rate or "
        "--config.pretrain_learning_rate, or use --config.dtype=float32; another --workdir starts "
        "afresh"
    )


@jax.jit
def _not_finite(state: TrainState) -> tuple[PyTree, ...]:
    """Which arrays have a number that is not finite."""

    def faulty(leaf: jax.Array) -> jax.Array:
        return ~jnp.isfinite(leaf).all()

    def faulty_in_optimizer(leaf: jax.Array) -> jax.Array:
        # The window and the lowest Lagrangian, which are scalars, begin at infinity.
        return faulty(leaf) if leaf.ndim else jnp.isnan(leaf)

    return (
        jax.tree.map(faulty, {"params": state.params}),
        jax.tree.map(faulty, {"batch_stats": state.batch_stats}),
        jax.tree.map(faulty, {"loss": state.sums.loss}),
        jax.tree.map(faulty_in_optimizer, {"opt_state": state.opt_state}),
    )


def faults(state: TrainState, row: Mapping[str, Any], setup: Setup) -> dict[str, str]:
    """Describes what a run survives, but hardly means: by a layer's path, or "validation".

    Args:
      state: after an epoch's last step.
      row: of `epoch_row`.
      setup: of the run.
    """
    found = {}
    if not math.isfinite(row["eval_loss"]):
        found["validation"] = "its loss is not finite, so its accuracy says nothing"
    if setup.constrained:
        found |= {
            layer: f"a multiplier is {value:.1e}: lower --config.multiplier_learning_rate"
            for layer, value in jax.device_get(_multipliers(state)).items()
            if value > _LARGE_MULTIPLIER
        }
    dead = jax.device_get(_dead(state.params, evaluated_weights(state, setup)))
    flags = jax.tree.leaves_with_path(dead)
    return found | {_name(path): "all its weights are 0" for path, flag in flags if flag}


@jax.jit
def _dead(latent: PyTree, evaluated: PyTree) -> PyTree:
    """Whether all latent, or all evaluated, weights of a kernel are 0."""

    def dead(*weights: jax.Array) -> Any:
        return weights[0].ndim > 1 and jnp.any(jnp.stack([jnp.all(w == 0) for w in weights]))

    return jax.tree.map(dead, latent, evaluated)


@jax.jit
def _multipliers(state: TrainState) -> dict[str, jax.Array]:
    """The largest multiplier of each layer that has any."""
    layers = cbp_jax.layer_report(state.params, state.opt_state).layers
    return {
        layer.layer: layer.multiplier_max for layer in layers if layer.multiplier_max is not None
    }


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
