"""The small experiments: what they write, and the parts they share. The whole main job is behind the marker `slow`."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

import digits
import fashion_mnist
from common import models, post_training
from common.input import in_memory as data
from common.models import SmallConvNet, SmallMLP
from common.report import workdir as report
from common.training import checkpoints
from common.training import step as train

import cbp_jax

ROOT = Path(__file__).parents[2]
METRICS = {
    "epoch",
    "step",
    "loss",
    "lagrangian",
    "window",
    "learning_rate",
    "cfs",
    "cfs_relative",
    "top1",
    "top5",
    "images_per_second",
}
SUMMARY = {
    "experiment",
    "constraint",
    "seed",
    "full_precision_top1",
    "ste_top1",
    "top1",
    "top5",
    "cfs",
    "cfs_relative",
    "bits_per_weight",
    "bytes_packed",
    "bytes_float32",
    "seconds",
    "bytes_file",
    "file_top1",
}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The command line of a user, shortened."""
    workdir = tmp_path_factory.mktemp("digits")
    short = {
        "epochs": 6,
        "pretrain_epochs": 4,
        "steps_per_epoch": 10,
        "patience": 1,
        "constraint": "two_bit_shift",
    }
    flags = [f"--config.{field}={value}" for field, value in short.items()]
    command = [
        sys.executable,
        str(ROOT / "experiments" / "digits.py"),
        f"--workdir={workdir}",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_run_writes_its_workdir(short_run):
    workdir, printed = short_run
    assert json.loads((workdir / "config.json").read_text())["epochs"] == 6
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == METRICS for row in rows)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert [row["window"] for row in rows] == [1, 2, 3, 4, 5, 6]  # patience 1: an update an epoch
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    assert (summary["experiment"], summary["constraint"], summary["bits_per_weight"]) == (
        "digits",
        "two_bit_shift",
        3,
    )
    assert summary["cfs_relative"] == rows[-1]["cfs_relative"]
    for name in ("training", "weights_conv2_kernel", "weights_conv3_kernel"):
        assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (workdir / "table.md").read_text()
    assert table in printed
    assert f"{summary['top1']:.2%}" in table
    assert summary["file_top1"] == summary["top1"]
    assert summary["bytes_file"] == (workdir / "weights.safetensors").stat().st_size
    assert "weights moved more than 1% of the scale" in printed


def test_checkpoint_is_the_state_that_was_measured(short_run):
    workdir, _ = short_run
    config = digits.get_config()
    config.update(json.loads((workdir / "config.json").read_text()))
    dataset = data.load_digits()
    model = SmallConvNet(num_classes=10, channels=config.channels, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    mask = cbp_jax.select(include=SmallConvNet.constrained)
    template = train.init_state(
        params, batch_stats, cbp_jax.cbp_sgd(1e-2, "two_bit_shift", mask=mask)
    )
    state = checkpoints.restore(workdir / "checkpoints" / "final", template)
    weights = cbp_jax.quantize(state.params, state.opt_state)
    batches = data.padded_batches(dataset.test_images, dataset.test_labels)
    accuracy = train.make_evaluate(graphdef)(weights, state.batch_stats, batches)
    assert accuracy["top1"] == json.loads((workdir / "summary.json").read_text())["top1"]
    assert int(state.step) == 60

    other = train.init_state(params, batch_stats, cbp_jax.cbp_sgd(1e-2, "binary", mask=mask))
    with pytest.raises(ValueError, match=r"another tree(.|\n)*two_bit_shift(.|\n)*binary"):
        checkpoints.restore(workdir / "checkpoints" / "final", other)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoints.restore(workdir / "checkpoints" / "none", other)


def test_a_second_run_replaces_the_first(tmp_path):
    report.Workdir(tmp_path).append_metrics({"epoch": 1})
    again = report.Workdir(tmp_path)
    again.append_metrics({"epoch": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"epoch": 2}\n'


def test_metrics_are_json_whatever_happens(tmp_path):
    report.Workdir(tmp_path).append_metrics(
        {"epoch": 1, "loss": float("nan"), "window": float("inf"), "lagrangian": -float("inf")}
    )
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"epoch": 1, "loss": null, "window": null, "lagrangian": null}\n'


def test_a_run_leaves_no_empty_metrics(tmp_path):
    """Neither at its start, nor where an earlier run was stopped before its first epoch ended."""
    workdir = report.Workdir(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    workdir.append_metrics({"epoch": 1, "step": 5})
    report.Workdir(tmp_path, step=6)
    assert report.Workdir.rows(tmp_path) == [{"epoch": 1, "step": 5}]
    report.Workdir(tmp_path, step=3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_weights_are_shown_midway_where_half_of_the_constraint_is_met():
    """With multipliers that soon grow: the first epoch at half of the first CFS, and the weights between both ends."""
    config = digits.get_config()
    config.update(
        {
            "pretrain_epochs": 2,
            "epochs": 25,
            "steps_per_epoch": 10,
            "patience": 1,
            "multiplier_learning_rate": 0.03,
        }
    )
    job, params, batch_stats = post_training.make_job(
        "digits", config, digits.make_dataset(config), digits.make_model(config)
    )
    pretrained, _ = post_training.pretrain(job, params, batch_stats)
    optimizer = post_training.cbp_optimizer(job, "ternary")
    outcome = post_training.post_train(job, pretrained, optimizer, "ternary CBP", lambda row: 0.0)
    half = next(
        row for row in outcome.rows if row["cfs_relative"] <= outcome.rows[0]["cfs_relative"] / 2
    )
    assert list(outcome.snapshots) == [
        "before",
        f"midway: epoch {half['epoch']}, g = {half['window']:.3g}",
        "after",
    ]
    violations = [
        np.mean(
            np.concatenate(
                [
                    np.abs(weights - np.clip(np.round(weights), -1, 1)).ravel()
                    for weights in snapshot.values()
                ]
            )
        )
        for snapshot in outcome.snapshots.values()
    ]
    assert violations[0] > violations[1] > violations[2]


def test_sizes():
    assert [report.size_text(count) for count in (0, 1249, 999_949, 1_000_000, 46_800_000)] == [
        "0.0 kB", "1.2 kB", "999.9 kB", "1.0 MB", "46.8 MB",
    ]  # fmt: skip


def test_packed_bytes():
    params = {"a": jnp.ones((3, 7)), "b": jnp.ones((5, 5)), "c": jnp.ones(4)}
    constraint = {"a": "binary", "b": "two_bit_shift"}
    state = cbp_jax.cbp(constraint).init(params)
    # 21 weights of 1 bit in 3 bytes, 25 of 3 bits in 10, a scale each, and four numbers as they are
    assert report.packed_bytes(params, state) == (3 + 4 + 10 + 4 + 16, 4 * (21 + 25 + 4))
    per_channel = cbp_jax.cbp(constraint, scale_axis=-1).init(params)
    assert report.packed_bytes(params, per_channel)[0] == 3 + 7 * 4 + 10 + 5 * 4 + 16


def test_shuffled_batches_see_every_image_once_a_pass():
    batches = list(itertools.islice(data.shuffled_batches(10, 4, seed=0), 10))
    passes = np.concatenate(batches).reshape(4, 10)
    np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(10), (4, 1)))
    assert len({tuple(order) for order in passes}) == 4
    again = list(itertools.islice(data.shuffled_batches(10, 4, seed=0), 10))
    np.testing.assert_array_equal(batches, again)


@pytest.mark.parametrize("batch_size", [7, 50, 64])
def test_evaluate_counts_every_image_once(batch_size):
    dataset = data.load_digits()
    images, labels = dataset.test_images[:50], dataset.test_labels[:50]
    model = SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    model.eval()
    order = np.argsort(-np.asarray(model(jnp.asarray(images))), axis=1)
    expected = {
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean(np.any(order[:, :5] == labels[:, None], axis=1)),
    }
    batches = data.padded_batches(images, labels, batch_size)
    expected |= {"images": 50, "unreadable": 0}
    assert train.make_evaluate(graphdef)(params, batch_stats, batches) == pytest.approx(expected)


def test_training_leaves_the_pretrained_weights_alone():
    """The step donates its state; what it started from must survive."""
    model = SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0))
    graphdef, params, batch_stats = models.split_model(model)
    before = jax.tree.map(np.array, params)
    optimizer = cbp_jax.cbp_sgd(
        0.1, "binary", mask=cbp_jax.select(include=SmallConvNet.constrained)
    )
    step = train.make_train_step(graphdef, optimizer, cbp_jax.quantize)
    batch = {"image": jnp.ones((4, 8, 8, 1)), "label": jnp.arange(4)}
    state, _ = step(train.init_state(params, batch_stats, optimizer), batch)
    assert not np.array_equal(state.params["conv2"]["kernel"], before["conv2"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (
            SmallConvNet(num_classes=10, channels=2, rngs=nnx.Rngs(0)),
            ["conv2/kernel", "conv3/kernel"],
        ),
        (
            SmallMLP(10, 784, 8, rngs=nnx.Rngs(0)),
            ["hidden1/kernel", "hidden2/kernel", "hidden3/kernel"],
        ),
    ],
)
def test_constrained_layers_are_all_but_the_first_and_the_last(model, layers):
    _, params, _ = models.split_model(model)
    state = cbp_jax.cbp("binary", mask=cbp_jax.select(include=model.constrained)).init(params)
    assert [layer.layer for layer in cbp_jax.layer_report(params, state).layers] == layers


def test_missing_data_set_says_how_to_prepare_it(tmp_path):
    pytest.importorskip("tensorflow_datasets", reason='needs the extra: pip install -e ".[test]"')
    with pytest.raises(
        FileNotFoundError, match=r"fashion_mnist(.|\n)*download_and_prepare(.|\n)*TFDS_DATA_DIR"
    ):
        data.load_tfds("fashion_mnist", str(tmp_path))
    config = fashion_mnist.get_config()
    config.data_dir = str(tmp_path)
    with pytest.raises(SystemExit, match="error: no 'fashion_mnist'"):
        fashion_mnist.main(config, str(tmp_path / "run"))


@pytest.mark.skipif(
    not (Path(os.environ.get("TFDS_DATA_DIR", "")) / "fashion_mnist").is_dir()
    or "TFDS_DATA_DIR" not in os.environ,
    reason="needs Fashion-MNIST as ArrayRecord in TFDS_DATA_DIR",
)
def test_fashion_mnist_is_read_whole():
    dataset = data.load_tfds("fashion_mnist", None)
    assert (dataset.train_images.shape, dataset.test_images.shape) == (
        (60000, 28, 28, 1),
        (10000, 28, 28, 1),
    )
    assert dataset.train_images.dtype == np.float32
    assert (dataset.train_images.min(), dataset.train_images.max()) == (0, 1)
    np.testing.assert_array_equal(np.bincount(dataset.train_labels), np.full(10, 6000))


@pytest.mark.slow
def test_main_job_meets_every_constraint(tmp_path):
    """As a user runs it: all four constraints met, and no accuracy lost to speak of."""
    command = [sys.executable, str(ROOT / "experiments" / "digits.py"), f"--workdir={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for constraint in post_training.CONSTRAINTS:
        summary = json.loads((tmp_path / constraint / "summary.json").read_text())
        assert summary["cfs_relative"] < 0.01, constraint
        assert summary["top1"] > summary["full_precision_top1"] - 0.02, constraint
