"""Batch statistics estimated anew, for the weights that a run ends with."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.input.batch import Batch, Preprocess
from common.training.step import TrainState, WeightsFn, as_given

PyTree = Any
Reestimate = Callable[[TrainState, Iterable[Batch]], TrainState]


def make_reestimate(
    graphdef: nnx.GraphDef,
    weights_fn: WeightsFn,
    preprocess: Preprocess = as_given,
    shardings: TrainState | None = None,
) -> Reestimate:
    """Returns a function (state, batches) -> state with batch statistics estimated anew.

        statistics = 1/n sum_b statistics(batch b)

    Training keeps running averages, over steps in which weights moved and changed their levels.
    Here the weights stay, and every batch counts alike; the result depends on nothing else, so it
    is the same where it is computed twice. Each batch passes the network as in training: normalised
    by its own statistics, and augmented with the keys of the steps that would follow.

    Args:
      graphdef: of `split_model`.
      weights_fn: maps the latent weights to those of the forward pass.
      preprocess: as for training.
      shardings: of the state on a mesh; None: as the arrays lie.
    """

    def add_statistics(
        sums: PyTree, weights: PyTree, state: TrainState, batch: Batch, index: int
    ) -> PyTree:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step + index)
        augment, dropout = jax.random.split(key)
        model = nnx.merge(graphdef, weights, state.batch_stats)
        for _, module in nnx.iter_graph(model):
            if isinstance(module, nnx.BatchNorm):
                module.momentum = 0.0  # what it then keeps are the statistics of this batch
        model.train()
        model(preprocess(batch, augment), rngs=nnx.Rngs(dropout=dropout))
        found = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
        return jax.tree.map(jnp.add, sums, found)

    add = jax.jit(add_statistics, out_shardings=shardings and shardings.batch_stats)

    def reestimate(state: TrainState, batches: Iterable[Batch]) -> TrainState:
        weights = jax.jit(weights_fn)(state.params, state.opt_state)
        rest = state._replace(params=None, opt_state=None)
        count, sums = 0, jax.tree.map(jnp.zeros_like, state.batch_stats)
        for count, batch in enumerate(batches, 1):
            sums = add(sums, weights, rest, batch, count - 1)
        return state._replace(batch_stats=jax.tree.map(lambda total: total / count, sums))

    return reestimate
