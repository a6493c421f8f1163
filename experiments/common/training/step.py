"""A functional training step and its evaluation, both jitted; the step donates its state."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from common.input.batch import UNREADABLE, Batch, Preprocess
from common.training.distillation import Distillation, Teacher
from common.training.mesh import batch_sharding

PyTree = Any
# Weights from the latent ones and the optimizer's state: `cbp_jax.quantize`, or `latent`.
WeightsFn = Callable[[PyTree, optax.OptState], PyTree]

# Weight of each auxiliary head's loss, where a network has them (GoogLeNet).
AUXILIARY_WEIGHT = 0.3


class Sums(NamedTuple):
    """Sums over the epoch so far; on the device, so that no step waits for the host."""

    loss: jax.Array  # shape=(), dtype=float32
    steps: jax.Array  # shape=(), dtype=int32
    images: jax.Array  # shape=(), dtype=int32: with a label, or windows of text
    unreadable: jax.Array  # shape=(), dtype=int32


class TrainState(NamedTuple):
    """Everything that a run changes, in plain dictionaries."""

    step: jax.Array  # shape=(), dtype=int32
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState
    # Data of a random key, shape=(2,), dtype=uint32; a step's own is folded in from its number.
    key: jax.Array
    sums: Sums


# (state, batch) -> (state, loss); where a teacher is asked for, its weights come third.
TrainStep = Callable[..., tuple[TrainState, jax.Array]]
Evaluate = Callable[[PyTree, PyTree, Iterable[Batch]], dict[str, float]]


def latent(params: PyTree, opt_state: optax.OptState) -> PyTree:
    """Returns the latent weights, for training in full precision."""
    del opt_state
    return params


def as_given(batch: Batch, key: jax.Array) -> jax.Array:
    """Returns the images of a batch, unchanged."""
    del key
    return batch["image"]


def zero_sums() -> Sums:
    zero = functools.partial(jnp.zeros, (), jnp.int32)
    return Sums(jnp.zeros((), jnp.float32), zero(), zero(), zero())


def init_state(
    params: PyTree, batch_stats: PyTree, optimizer: optax.GradientTransformation, seed: int = 0
) -> TrainState:
    """Returns a state to start from; arrays are copied, so that donation spares the caller's."""
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
    distillation: Distillation | None = None,
) -> TrainStep:
    """Returns a jitted step (state, batch) -> (state, loss), which donates the state.

    The gradient is taken at the forward weights and applied to the latent ones: the
    straight-through estimator. The loss is the mean cross-entropy over the labels that are not
    negative, one per image or per token, plus a fraction of that of the auxiliary heads. A teacher
    sees the same images, in evaluation mode, and counts for the main head.

    Args:
      graphdef: of `split_model`.
      optimizer: receives the loss as `value`.
      weights_fn: maps the latent weights to the forward weights.
      preprocess: makes the network's images from a batch; may draw from its key.
      shardings: of the state on a mesh (`mesh.state_shardings`); None: as the arrays lie. The
        forward weights are replicated, so that devices differ in their images alone.
      distillation: makes it a step (state, batch, teacher) -> (state, loss).
    """

    def loss_fn(
        weights: PyTree,
        batch_stats: PyTree,
        images: jax.Array,
        labels: jax.Array,
        key: jax.Array,
        teacher_logits: jax.Array | None,
    ) -> tuple[jax.Array, PyTree]:
        model = nnx.merge(graphdef, weights, batch_stats)
        model.train()
        outputs = model(images, rngs=nnx.Rngs(dropout=key))
        logits, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = _cross_entropy(logits, labels, distillation, teacher_logits)
        loss += AUXILIARY_WEIGHT * sum(_cross_entropy(head, labels) for head in auxiliary)
        return loss, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def teach(teacher: Teacher, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, *teacher)
        model.eval()
        return model(images)

    def train_step(
        state: TrainState, batch: Batch, *teacher: Teacher
    ) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        augment, dropout = jax.random.split(key)
        images, labels = preprocess(batch, augment), batch["label"]
        weights = weights_fn(state.params, state.opt_state)
        if shardings is not None:
            weights = jax.lax.with_sharding_constraint(weights, shardings.step)
        teacher_logits = teach(teacher[0], images) if distillation else None
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), grads = grad_fn(
            weights, state.batch_stats, images, labels, dropout, teacher_logits
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=loss)
        params = optax.apply_updates(state.params, updates)
        sums = Sums(
            loss=state.sums.loss + loss,
            steps=state.sums.steps + 1,
            images=state.sums.images + jnp.sum(_labelled(labels)),
            unreadable=state.sums.unreadable + jnp.sum(labels == UNREADABLE),
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state, state.key, sums), loss

    if shardings is None:
        return jax.jit(train_step, donate_argnums=0)
    on_batch, everywhere = batch_sharding(shardings.step.mesh), shardings.step  # type: ignore[attr-defined]
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, on_batch, *([everywhere] if distillation else [])),
        out_shardings=(shardings, shardings.step),
    )


def _cross_entropy(
    logits: jax.Array,
    labels: jax.Array,
    distillation: Distillation | None = None,
    teacher_logits: jax.Array | None = None,
) -> jax.Array:
    """The mean over the labels, of any shape; 0 if none is given. A teacher's targets blend in."""
    has_label, losses = labels >= 0, _losses(logits, labels)
    if distillation is not None and teacher_logits is not None:  # they come together
        losses = distillation.blend(losses, logits, teacher_logits)
    return jnp.sum(jnp.where(has_label, losses, 0)) / jnp.maximum(jnp.sum(has_label), 1)


def _losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The cross-entropy of each label; where it is negative, a number that must not count."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))


def _labelled(labels: jax.Array) -> jax.Array:
    """Whether each image, or window of text, has a label."""
    return (labels >= 0).any(axis=tuple(range(1, labels.ndim)))


def make_evaluate(graphdef: nnx.GraphDef, preprocess: Preprocess = as_given) -> Evaluate:
    """Returns a function (weights, batch_stats, batches) -> accuracies, loss and counts.

    "top1" and "top5" are fractions of the labels that are neither padding nor "unreadable", and
    "loss" is their mean cross-entropy; "images" have such a label, or many if they are text.
    """

    @jax.jit
    def count(weights: PyTree, batch_stats: PyTree, batch: Batch) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights, batch_stats)
        model.eval()
        labels = batch["label"]
        logits = model(preprocess(batch, jax.random.key(0)))  # nothing is drawn in evaluation
        # Negative labels never hit.
        hits = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[..., None]
        found = {
            "top1": hits[..., 0],
            "top5": hits.any(axis=-1),
            "loss": jnp.where(labels >= 0, _losses(logits, labels), 0),
            "labels": labels >= 0,
            "images": _labelled(labels),
            "unreadable": labels == UNREADABLE,
        }
        return {name: values.sum() for name, values in found.items()}

    def evaluate(
        weights: PyTree, batch_stats: PyTree, batches: Iterable[Batch]
    ) -> dict[str, float]:
        names = ("top1", "top5", "loss", "labels", "images", "unreadable")
        totals = dict.fromkeys(names, 0.0)
        pending: dict[str, jax.Array] = {}
        for batch in batches:
            counts = count(weights, batch_stats, batch)
            # Adds those of the batch before, while the device works on this one.
            totals, pending = _add(totals, pending), counts
        totals = _add(totals, pending)
        labels = max(totals.pop("labels"), 1.0)
        return totals | {name: totals[name] / labels for name in ("top1", "top5", "loss")}

    return evaluate


def _add(totals: dict[str, float], counts: dict[str, jax.Array]) -> dict[str, float]:
    return totals | {name: totals[name] + float(count) for name, count in counts.items()}
