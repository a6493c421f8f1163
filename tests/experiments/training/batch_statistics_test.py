"""Batch statistics estimated anew, against numpy and within a run."""

import itertools
import shutil

import evaluate
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import models
from common.input.open import open_data
from common.models import SmallMLP
from common.report.workdir import read_metrics
from common.training import batch_statistics, restore, step
from common.training.run import train_and_evaluate
from common.training.settle import settle
from flax import nnx
from run_support import EPOCHS, STEPS_PER_EPOCH, digits_config

BATCHES = np.random.default_rng(0).normal(size=(3, 16, 5)).astype(np.float32)


def signs(params, opt_state):
    """Quantizes the hidden kernels to their signs."""
    del opt_state
    hidden = {name: {"kernel": jnp.sign(params[name]["kernel"])} for name in HIDDEN}
    return params | hidden


HIDDEN = ("hidden1", "hidden2", "hidden3")


@pytest.fixture(scope="module")
def network():
    model = SmallMLP(num_classes=3, features_in=5, width=4, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    params["bn1"]["scale"], params["bn1"]["bias"] = jnp.arange(1.0, 5.0), jnp.arange(4.0)
    return graphdef, params, batch_stats


def statistics(params, images):
    """Those of one batch, in float64: mean and biased variance before each normalization."""
    found, x = {}, images.astype(np.float64)
    for index in range(4):
        kernel = np.asarray(params[f"hidden{index}"]["kernel"], np.float64)
        norm = params[f"bn{index}"]
        x = x @ (np.sign(kernel) if index else kernel)
        mean, var = x.mean(axis=0), x.var(axis=0)
        found[f"bn{index}"] = {"mean": mean, "var": var}
        x = (x - mean) / np.sqrt(var + 1e-5) * np.asarray(norm["scale"]) + np.asarray(norm["bias"])
        x = np.maximum(x, 0)
    return found


def test_statistics_are_averages_over_batches(network):
    graphdef, params, batch_stats = network
    state = step.init_state(params, batch_stats, optax.sgd(0.1))
    reestimate = batch_statistics.make_reestimate(graphdef, signs)
    batches = [{"image": images, "label": np.zeros(16, np.int32)} for images in BATCHES]
    new = reestimate(state, iter(batches))
    each = [statistics(params, images) for images in BATCHES]
    expected = jax.tree.map(lambda *values: np.mean(values, axis=0), *each)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6),
        new.batch_stats,
        expected,
    )
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    again = reestimate(new, iter(batches))  # whatever they were before
    jax.tree.map(np.testing.assert_array_equal, again.batch_stats, new.batch_stats)


def test_images_are_augmented_as_in_the_steps_that_would_follow(network):
    graphdef, params, batch_stats = network
    state = step.init_state(params, batch_stats, optax.sgd(0.1), seed=3)._replace(
        step=jnp.asarray(7, jnp.int32)
    )

    def shifted(batch, key):
        return batch["image"] + jax.random.normal(key, (5,))

    reestimate = batch_statistics.make_reestimate(graphdef, signs, shifted)
    new = reestimate(state, [{"image": images, "label": None} for images in BATCHES])
    keys = [jax.random.split(jax.random.fold_in(jax.random.key(3), 7 + i))[0] for i in range(3)]
    means = [
        statistics(params, images + np.asarray(jax.random.normal(key, (5,))))["bn0"]["mean"]
        for images, key in zip(BATCHES, keys, strict=True)
    ]
    np.testing.assert_allclose(new.batch_stats["bn0"]["mean"], np.mean(means, axis=0), atol=1e-5)


def test_a_run_ends_with_them(tmp_path):
    """Weights are those of a run without; summary, packed file, row and checkpoint agree."""
    train_and_evaluate(digits_config(), tmp_path / "plain")
    config, workdir = digits_config(reestimate_batches=4), tmp_path / "reestimated"
    summary = train_and_evaluate(config, workdir)
    plain, run = restore.restore(tmp_path / "plain"), restore.restore(workdir)
    jax.tree.map(np.testing.assert_array_equal, run.state.params, plain.state.params)
    stats, others = run.state.batch_stats, plain.state.batch_stats
    assert not np.allclose(stats["bn3"]["var"], others["bn3"]["var"])
    rows, plain_rows = (read_metrics(tmp_path / name) for name in ("reestimated", "plain"))
    assert [row["top1"] for row in rows[:-1]] == [row["top1"] for row in plain_rows[:-1]]
    assert summary.top1 == rows[-1]["top1"] == summary.file_top1
    assert summary.top1 == evaluate.evaluate_run(run)["top1"]
    mean = first_means(run.state.params["conv1"]["kernel"], open_data(settle(config)))
    np.testing.assert_allclose(stats["bn1"]["mean"], mean, rtol=1e-4, atol=1e-6)


def first_means(kernel, loader):
    """The mean of the first convolution over the four batches after the last step, in numpy."""
    means = []
    for batch in itertools.islice(loader.train(EPOCHS * STEPS_PER_EPOCH), 4):
        padded = np.pad(np.asarray(batch["image"], np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(padded[..., 0], (3, 3), axis=(1, 2))
        out = np.einsum("nhwij,ijo->nhwo", patches, np.asarray(kernel, np.float64)[:, :, 0])
        means.append(out.mean(axis=(0, 1, 2)))
    return np.mean(means, axis=0)


@pytest.mark.parametrize("last", [2 * STEPS_PER_EPOCH, EPOCHS * STEPS_PER_EPOCH])
def test_a_resumed_run_ends_with_the_same(tmp_path, last):
    """Killed in its last epoch, or after its last step."""
    config = digits_config(reestimate_batches=2)
    summary = train_and_evaluate(config, tmp_path / "run")
    copy = shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (copy / "summary.json").unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > last:
            shutil.rmtree(folder)
    again = train_and_evaluate(config, copy)
    assert (again.top1, again.file_top1) == (summary.top1, summary.file_top1)
    states = [restore.restore(folder).state for folder in (tmp_path / "run", copy)]
    jax.tree.map(np.testing.assert_array_equal, *states)
