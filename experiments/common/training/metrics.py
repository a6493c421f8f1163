"""What a run watches of its CBP state."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

import cbp_jax
from common.training.step import TrainState

PyTree = Any

# Enough for a histogram; a layer of millions need not leave the device.
_SAMPLE = 2**16


@jax.jit
def cbp_metrics(state: TrainState) -> dict[str, jax.Array]:
    """Of the state after an epoch's last step; the Lagrangian is summed over the epoch."""
    return {
        "lagrangian": state.opt_state.cbp.lagrangian_sum,
        "window": cbp_jax.window(state.opt_state),
        "cfs": cbp_jax.constraint_failure_score(state.params, state.opt_state),
        "cfs_relative": cbp_jax.constraint_failure_score(
            state.params, state.opt_state, relative=True
        ),
    }


@jax.jit
def layer_violations(state: TrainState) -> dict[str, jax.Array]:
    """The mean violation of each constrained layer, in units of its scale."""
    return {
        layer.layer: layer.violation
        for layer in cbp_jax.layer_report(state.params, state.opt_state).layers
    }


def relative_weights(state: TrainState) -> dict[str, np.ndarray]:
    """Latent weights of each constrained layer in units of their scale; evenly spaced ones, if
    there are very many.

    With several hosts it must be called on all of them.
    """
    lies = state.step.sharding  # on every device of a mesh, so that each host has all of them
    whole = jax.jit(
        _relative_weights, out_shardings=lies if isinstance(lies, NamedSharding) else None
    )
    return {layer: np.asarray(weights) for layer, weights in whole(state).items()}


def _relative_weights(state: TrainState) -> dict[str, jax.Array]:
    scales = jax.tree_util.tree_flatten_with_path(state.opt_state.cbp.weight_scale)[0]
    weights = dict(jax.tree_util.tree_flatten_with_path(state.params)[0])
    relative = {
        jax.tree_util.keystr(path, simple=True, separator="/"): weights[path] / scale
        for path, scale in scales
    }
    return {
        layer: w.ravel()[:: w.size // _SAMPLE + 1] if w.size > _SAMPLE else w
        for layer, w in relative.items()
    }


@jax.jit
def all_finite(tree: PyTree) -> jax.Array:
    """Whether every number of a tree is finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
