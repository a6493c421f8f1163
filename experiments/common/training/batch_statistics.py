"""Batch statistics of a network whose weights are done: a plain mean, not a running one."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from common.input.batch import Batch, Preprocess
from common.models.layers import MOMENTUM

PyTree = Any


def estimate(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    weights: PyTree,
    batch_stats: PyTree,
    batches: Iterable[Batch],
    key: jax.Array,
) -> PyTree:
    """Returns the mean over batches of each batch's means and variances.

    While weights flip between levels, the running statistics are those of several networks. These
    are of one.

    Args:
      graphdef: of `models.split_model`.
      preprocess: that of training.
      weights: of the forward pass.
      batch_stats: gives the structure; empty if the network has none.
      batches: of training images.
      key: for augmentation and dropout.
    """
    if not jax.tree.leaves(batch_stats):
        return batch_stats
    zeros = jax.tree.map(jnp.zeros_like, batch_stats)
    total, count = zeros, 0
    for batch in batches:
        key, mine = jax.random.split(key)
        found = _of_batch(graphdef, preprocess, weights, zeros, batch, mine)
        total, count = jax.tree.map(jnp.add, total, found), count + 1
    return jax.tree.map(lambda stats: stats / count, total)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _of_batch(
    graphdef: nnx.GraphDef,
    preprocess: Preprocess,
    weights: PyTree,
    zeros: PyTree,
    batch: Batch,
    key: jax.Array,
) -> PyTree:
    augment, dropout = jax.random.split(key)
    model = nnx.merge(graphdef, weights, zeros)
    model.train()
    model(preprocess(batch, augment), rngs=nnx.Rngs(dropout=dropout))
    # From 0, a running mean takes 1 - MOMENTUM of the first batch.
    stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    return jax.tree.map(lambda value: value / (1 - MOMENTUM), stats)
