"""A functional training loop: the module is split once and merged inside one jitted, donated step."""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

PyTree = Any
# The weights of the forward pass from the latent ones: `cbp_jax.quantize`, or `latent`.
WeightsFn = Callable[[PyTree, optax.OptState], PyTree]


class TrainState(NamedTuple):
    """All that a run changes, in plain dictionaries."""

    step: jax.Array  # shape=(), dtype=int32
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState


class EpochLog(NamedTuple):
    """What the loop knows at the end of an epoch."""

    epoch: int  # counted from 1
    state: TrainState
    loss: float
    images_per_second: float


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, jax.Array]]


def latent(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """The weights as they are."""
    del opt_state
    return params


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """The module's static part, its parameters and its batch statistics."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # type: ignore[misc]
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def init_state(params: PyTree, batch_stats: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """A state to start from; it copies the arrays, so that donating them leaves the caller's alone."""
    params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
    return TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))


def make_train_step(graphdef: nnx.GraphDef, optimizer: optax.GradientTransformationExtraArgs, weights_fn: WeightsFn) -> TrainStep:
    """A jitted step (state, images, labels) -> (state, loss), which donates the state.

    The gradient is taken at `weights_fn(params, opt_state)` and applied to `params`: the straight-through estimator.
    """

    def loss_fn(weights: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, PyTree]:
        model = nnx.merge(graphdef, weights, batch_stats)
        model.train()
        loss = optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
        weights = weights_fn(state.params, state.opt_state)
        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(weights, state.batch_stats, images, labels)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, batch_stats, opt_state), loss

    return train_step


def make_evaluate(
    graphdef: nnx.GraphDef, weights_fn: WeightsFn, batch_size: int = 1000
) -> Callable[[TrainState, np.ndarray, np.ndarray], dict[str, float]]:
    """A function (state, images, labels) -> {"top1", "top5"}, shares of 1, in evaluation mode."""

    @jax.jit
    def count_correct(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, weights_fn(state.params, state.opt_state), state.batch_stats)
        model.eval()
        hits = jax.lax.top_k(model(images), 5)[1] == labels[:, None]
        return hits[:, 0].sum(), hits.any(axis=1).sum()

    def evaluate(state: TrainState, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        top1 = top5 = 0
        for start in range(0, len(labels), batch_size):
            batch, target = images[start : start + batch_size], labels[start : start + batch_size]
            short = batch_size - len(target)  # padded, so that one shape is compiled; -1 is never hit
            batch = np.concatenate([batch, np.zeros((short, *batch.shape[1:]), batch.dtype)])
            hits1, hits5 = count_correct(state, batch, np.concatenate([target, np.full(short, -1, target.dtype)]))
            top1, top5 = top1 + int(hits1), top5 + int(hits5)
        return {"top1": top1 / len(labels), "top5": top5 / len(labels)}

    return evaluate


def train(
    state: TrainState,
    train_step: TrainStep,
    images: np.ndarray,
    labels: np.ndarray,
    batches: Iterator[np.ndarray],
    *,
    epochs: int,
    steps_per_epoch: int,
) -> Iterator[EpochLog]:
    """Trains, and yields after every epoch; the state of a log is valid until the next is asked for (it is donated then)."""
    for epoch in range(1, epochs + 1):
        started, losses, seen = time.perf_counter(), [], 0
        for _ in range(steps_per_epoch):
            index = next(batches)
            state, loss = train_step(state, images[index], labels[index])
            losses.append(loss)
            seen += len(index)
        mean_loss = float(jnp.mean(jnp.stack(losses)))  # waits for the device
        yield EpochLog(epoch, state, mean_loss, seen / (time.perf_counter() - started))
