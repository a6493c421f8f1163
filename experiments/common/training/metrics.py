"""What a run measures at the end of an epoch."""

from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

import cbp_jax
from common.training.setup import Evaluate, Setup
from common.training.step import TrainState

PyTree = Any
# Enough for a histogram; a layer of millions need not leave the device.
_SAMPLE = 2**16


def evaluated_weights(state: TrainState, setup: Setup) -> PyTree:
    """Returns the weights whose accuracy counts: the quantized ones, if there is a constraint."""
    return jax.jit(setup.deployed_fn)(state.params, state.opt_state)


def epoch_row(
    state: TrainState, setup: Setup, evaluate: Evaluate, images_per_second: float
) -> dict[str, Any]:
    """Returns a line of `metrics.jsonl`, from the state after an epoch's last step."""
    sums, step = jax.device_get(state.sums), int(state.step)
    row: dict[str, Any] = {
        "epoch": step // setup.steps_per_epoch,
        "step": step,
        "loss": float(sums.loss) / int(sums.steps),
    }
    deployed = deployed_state(state, setup)
    if setup.constrained:
        row |= {name: float(value) for name, value in _constraint_metrics(deployed).items()}
        if "lagrangian" in row:
            row["lagrangian"] /= setup.steps_per_epoch
    accuracy = evaluate(evaluated_weights(state, setup), state.batch_stats)
    row |= {
        "learning_rate": _learning_rate(state.opt_state),
        "top1": accuracy["top1"],
        "top5": accuracy["top5"],
        "eval_loss": accuracy["loss"],
    }
    if setup.constrained:
        row |= jax.tree.map(float, _layer_means(deployed))
    return row | {"images_per_second": images_per_second, "unreadable": int(sums.unreadable)}


def deployed_state(state: TrainState, setup: Setup) -> TrainState:
    """Returns the state with the scales of the weights that are deployed."""
    # Compiled: outside of it a scale of 0, of a layer that has died, is an error.
    opt_state = jax.jit(setup.deployed_state_fn)(state.params, state.opt_state)
    return state._replace(opt_state=opt_state)


def _learning_rate(opt_state: optax.OptState) -> float:
    """The rate that the optimizer applied in the last step, as its state says."""

    def is_array(
        path: Any, value: Any
    ) -> bool:  # optax keeps the schedule's state by this name too
        return isinstance(value, jax.Array)

    return float(optax.tree_utils.tree_get(opt_state, "learning_rate", filtering=is_array))


@jax.jit
def _constraint_metrics(state: TrainState) -> dict[str, jax.Array]:
    """The Lagrangian, that of `cbp`, is summed over the epoch; `ste` has no window either."""
    params, opt_state = state.params, state.opt_state
    links = (cbp_jax.CBPState, cbp_jax.ClosingState)
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, links))
    found = {}
    for node in nodes:
        if isinstance(node, links):
            found["window"] = node.window
        if isinstance(node, cbp_jax.CBPState):
            found["lagrangian"] = node.lagrangian_sum
    return found | {
        "cfs": cbp_jax.constraint_failure_score(params, opt_state),
        "cfs_relative": cbp_jax.constraint_failure_score(params, opt_state, relative=True),
    }


@jax.jit
def _layer_means(state: TrainState) -> dict[str, dict[str, jax.Array]]:
    """Each layer's mean violation, in units of its scale, and mean multiplier, if it has any."""
    layers = cbp_jax.layer_report(state.params, state.opt_state).layers
    found = {"violation": {layer.layer: layer.violation for layer in layers}}
    multipliers = {
        layer.layer: layer.multiplier_mean for layer in layers if layer.multiplier_mean is not None
    }
    return found | ({"multiplier": multipliers} if multipliers else {})


def relative_weights(state: TrainState) -> dict[str, np.ndarray]:
    """Returns each constrained layer's latent weights in units of their scale, for a histogram.

    Of a very large layer, evenly spaced weights. Call it on all hosts: each gets all weights.
    """

    def sampled(params: PyTree, opt_state: optax.OptState) -> dict[str, jax.Array]:
        layers = cbp_jax.relative_weights(params, opt_state)
        return {
            name: w.ravel()[:: w.size // _SAMPLE + 1] if w.size > _SAMPLE else w
            for name, w in layers.items()
        }

    sharding = state.step.sharding  # replicated on a mesh
    whole = jax.jit(
        sampled, out_shardings=sharding if isinstance(sharding, NamedSharding) else None
    )
    return jax.tree.map(np.asarray, whole(state.params, state.opt_state))
