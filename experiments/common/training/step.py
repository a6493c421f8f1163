"""A functional training step and its evaluation: the module is split once and merged inside one jitted, donated step."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.input.batch import UNREADABLE, Batch, Preprocess
from common.training.mesh import batch_sharding

PyTree = Any
# The weights of the forward pass from the latent ones: `cbp_jax.quantize`, or `latent`.
WeightsFn = Callable[[PyTree, optax.OptState], PyTree]

# Of each auxiliary head's loss, where a network has them (GoogLeNet).
AUXILIARY_WEIGHT = 0.3


class Sums(NamedTuple):
    """Over the steps since the epoch began; kept on the device, so that no step waits for the host."""

    loss: jax.Array  # shape=(), dtype=float32
    steps: jax.Array  # shape=(), dtype=int32
    images: jax.Array  # shape=(), dtype=int32: those that were learnt from
    unreadable: jax.Array  # shape=(), dtype=int32


class TrainState(NamedTuple):
    """All that a run changes, in plain dictionaries."""

    step: jax.Array  # shape=(), dtype=int32
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    key: (
        jax.Array
    )  # shape=(2,), dtype=uint32: data of a random key; a step's own is folded in from its number
    sums: Sums


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]
Evaluate = Callable[[PyTree, PyTree, Iterable[Batch]], dict[str, float]]


def latent(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """The weights as they are."""
    del opt_state
    return params


def as_given(batch: Batch, key: jax.Array) -> jax.Array:
    """The images as they are."""
    del key
    return batch["image"]


def zero_sums() -> Sums:
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    return Sums(jnp.zeros((), jnp.float32), zero(), zero(), zero())


def init_state(
    params: PyTree, batch_stats: PyTree, optimizer: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    """A state to start from; it copies the arrays, so that donating them leaves the caller's alone."""
    params, batch_stats = jax.tree.map(jnp.copy, (params, batch_stats))
    key = jax.random.key_data(jax.random.key(seed))
    return TrainState(
        jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params), key, zero_sums()
    )


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    weights_fn: WeightsFn,
    preprocess: Preprocess = as_given,
    shardings: TrainState | None = None,
) -> TrainStep:
    """A jitted step (state, batch) -> (state, loss), which donates the state.

    The gradient is taken at the forward weights and applied to the latent ones: the
    straight-through estimator. The loss is the mean cross-entropy over the images whose label is
    not negative, with a share of that of the auxiliary heads.

    Args:
      graphdef: of `split_model`.
      optimizer: it is given the loss as `value`.
      weights_fn: the forward weights from the latent ones.
      preprocess: the network's images from a batch; it may draw from the key it is given.
      shardings: how the state lies on a mesh (`mesh.state_shardings`); None leaves it to the
        arrays. The forward weights are whole on every device, so that devices differ in their
        images alone.
    """

    def loss_fn(
        weights: PyTree, batch_stats: PyTree, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, PyTree]:
        model = nnx.merge(graphdef, weights, batch_stats)
        model.train()
        outputs = model(images, rngs=nnx.Rngs(dropout=key))
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = _cross_entropy(logits, labels) + AUXILIARY_WEIGHT * sum(
            _cross_entropy(head, labels) for head in auxiliary
        )
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment, dropout = jax.random.split(key)
        images, labels = preprocess(batch, augment), batch["label"]
        weights = weights_fn(state.params, state.opt_state)
        if shardings is not None:
            weights = jax.lax.with_sharding_constraint(weights, shardings.step)
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(weights, state.batch_stats, images, labels, dropout)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        sums = Sums(
            loss=state.sums.loss + loss,
            steps=state.sums.steps + 1,
            images=state.sums.images + jnp.sum(labels >= 0),
            unreadable=state.sums.unreadable + jnp.sum(labels == UNREADABLE),
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state, state.key, sums), loss

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(shardings.step.mesh)),  # type: ignore[attr-defined]
        out_shardings=(shardings, shardings.step),
    )


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the images that have a label; 0 if none has."""
    has_label = labels >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(has_label, labels, 0)
    )
    return jnp.sum(jnp.where(has_label, losses, 0)) / jnp.maximum(jnp.sum(has_label), 1)


def make_evaluate(graphdef: nnx.GraphDef, preprocess: Preprocess = as_given) -> Evaluate:
    """A function (weights, batch_stats, batches) -> {"top1", "top5", "images", "unreadable"}, in
    evaluation mode.

    Accuracies are shares of 1 of the images that could be read and are not padding.
    """

    @jax.jit
    def count(weights: PyTree, batch_stats: PyTree, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights, batch_stats)
        model.eval()
        labels = batch["label"]
        # Nothing is drawn in evaluation: the key is there for the signature.
        logits = model(preprocess(batch, jax.random.key(0)))
        hits = (
            jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
        )  # negative labels never hit
        sums = {
            "top1": hits[:, 0],
            "top5": hits.any(axis=1),
            "images": labels >= 0,
            "unreadable": labels == UNREADABLE,
        }
        return {name: values.sum() for name, values in sums.items()}

    def evaluate(
        weights: PyTree, batch_stats: PyTree, batches: Iterable[Batch]
    ) -> dict[str, float]:
        totals = {"top1": 0.0, "top5": 0.0, "images": 0.0, "unreadable": 0.0}
        pending: dict[str, jax.Array] | None = None
        for batch in batches:
            counts = count(weights, batch_stats, batch)
            totals = _add(
                totals, pending
            )  # of the batch before, while the device works on this one
            pending = counts
        totals = _add(totals, pending)
        return totals | {
            name: totals[name] / max(totals["images"], 1.0) for name in ("top1", "top5")
        }

    return evaluate


def _add(totals: dict[str, float], counts: dict[str, jax.Array] | None) -> dict[str, float]:
    return (
        totals
        if counts is None
        else {name: total + float(counts[name]) for name, total in totals.items()}
    )
