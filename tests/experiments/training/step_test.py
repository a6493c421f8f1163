"""The training step and the evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import models
from common.input import in_memory
from common.models import SmallConvNet
from common.training import step as training_step
from flax import nnx

import cbp_jax


@pytest.mark.parametrize("batch_size", [7, 50, 64])
def test_evaluate_counts_every_image_once(batch_size):
    dataset = in_memory.load_digits()
    images, labels = dataset.test_images[:50], dataset.test_labels[:50]
    model = SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    model.eval()
    order = np.argsort(-np.asarray(model(jnp.asarray(images))), axis=1)
    expected = {
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean(np.any(order[:, :5] == labels[:, None], axis=1)),
    }
    batches = in_memory.padded_batches(images, labels, batch_size)
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
