"""The training step and the evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import models
from common.input import in_memory
from common.models import SmallConvNet
from common.training import step as training_step
from common.training.distillation import Distillation, Teacher
from common.training.step import latent
from flax import nnx

import cbp_jax


@pytest.mark.parametrize("batch_size", [7, 50, 64])
def test_evaluate_counts_every_image_once(batch_size):
    dataset = in_memory.load_digits()
    images, labels = dataset.test_images[:50], dataset.test_labels[:50]
    model = SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    model.eval()
    logits = np.asarray(model(jnp.asarray(images)))
    order = np.argsort(-logits, axis=1)
    expected = {
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean(np.any(order[:, :5] == labels[:, None], axis=1)),
    }
    batches = in_memory.padded_batches(images, labels, batch_size)
    expected["loss"] = -np.mean(log_softmax(logits)[np.arange(50), labels])
    expected |= {"images": 50, "unreadable": 0}
    assert training_step.make_evaluate(graphdef)(params, batch_stats, batches) == pytest.approx(
        expected
    )


def test_training_leaves_the_pretrained_weights_alone():
    """The step donates its state; what it started from must survive."""
    model = SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    before = jax.tree.map(np.array, params)
    optimizer = cbp_jax.cbp_sgd(
        0.1, "binary", mask=cbp_jax.select(include=SmallConvNet.constrained)
    )
    step = training_step.make_train_step(graphdef, optimizer, cbp_jax.quantize)
    batch = {"image": jnp.ones((4, 8, 8, 1)), "label": jnp.arange(4)}
    state, _ = step(training_step.init_state(params, batch_stats, optimizer), batch)
    assert not np.array_equal(state.params["conv2"]["kernel"], before["conv2"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params, before)


def distilled(share, temperature=3.0, labels=(0, 1, 2, 3, -1, -1)):
    """One plain step of gradient descent, with and without a teacher, on six images."""
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    student, teacher = (
        SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(seed)) for seed in (0, 1)
    )
    graphdef, params, batch_stats = models.split_model(student)
    optimizer = optax.with_extra_args_support(optax.sgd(0.1))
    asked = Distillation(share, temperature) if share is not None else None
    step = training_step.make_train_step(graphdef, optimizer, latent, distillation=asked)
    state = training_step.init_state(params, batch_stats, optimizer)
    batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
    weights = () if share is None else (Teacher(*models.split_model(teacher)[1:]),)
    after, loss = step(state, batch, *weights)
    teacher.eval()
    student.train()
    return after, float(loss), np.asarray(student(images)), np.asarray(teacher(images))


def log_softmax(x):
    x = np.float64(x) - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def test_the_distilled_loss_by_its_definition():
    """The images without a label count neither here nor there."""
    for share, temperature in ((0.25, 3.0), (1.0, 1.0)):
        _, loss, student, teacher = distilled(share, temperature)
        cross_entropy = -np.mean([log_softmax(student)[i, i] for i in range(4)])
        soft, targets = (log_softmax(x / temperature)[:4] for x in (student, teacher))
        divergence = np.mean(np.sum(np.exp(targets) * (targets - soft), axis=1))
        assert divergence > 1e-3
        expected = (1 - share) * cross_entropy + share * temperature**2 * divergence
        assert loss == pytest.approx(expected, rel=1e-5)


def test_without_a_share_the_teacher_changes_nothing():
    (with_teacher, loss, *_), (without, other, *_) = distilled(0.0), distilled(None)
    assert loss == other
    jax.tree.map(np.testing.assert_array_equal, with_teacher, without)


def test_a_teacher_moves_the_student_towards_itself():
    """With the whole share, and by a gradient through the student alone."""
    after, loss, _, teacher = distilled(1.0, 1.0, labels=(9,) * 6)
    graphdef = models.split_model(SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0)))[0]
    model = nnx.merge(graphdef, after.params, after.batch_stats)
    model.train()
    images = np.random.default_rng(0).normal(size=(6, 8, 8, 1)).astype(np.float32)
    targets, soft = log_softmax(teacher), log_softmax(np.asarray(model(images)))
    assert np.mean(np.sum(np.exp(targets) * (targets - soft), axis=1)) < loss
