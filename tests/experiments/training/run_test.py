"""A run: what it writes, that stopping it leaves no trace, and what it refuses."""

import os
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

import evaluate
from common import models
from common.input.open import open_data
from common.models import torch_weights
from common.report.workdir import Summary, Workdir, read_metrics
from common.training import checkpoints, loop, restore, setup
from common.training.run import train_and_evaluate
from common.training.settle import settle
from run_support import EPOCHS, STEPS_PER_EPOCH, digits_config, photos_config, run_script
from same_run import assert_same_run, read_state

STEPS = STEPS_PER_EPOCH * EPOCHS
STOPPED = 7  # in the middle of the second epoch


@pytest.fixture(scope="module")
def of_photos(photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("of_photos")
    return workdir, train_and_evaluate(photos_config(photos), workdir)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    train_and_evaluate(digits_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Stopped by SIGTERM in the middle of its second epoch, and not resumed yet."""
    workdir, step = tmp_path_factory.mktemp("interrupted"), loop.Meter.step
    counted = iter(range(1, STEPS))

    def step_and_kill(meter, loss):
        step(meter, loss)
        if next(counted) == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Meter, "step", step_and_kill)
        with pytest.raises(loop.Stopped) as stopped:
            train_and_evaluate(digits_config(), workdir)
    assert stopped.value.code == 0
    return workdir


@pytest.fixture
def copy(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "run")


def test_a_run_writes_its_workdir(of_photos, capsys):
    workdir, summary = of_photos
    rows = read_metrics(workdir)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert [row["window"] for row in rows] == [1, 2, 3]  # patience 1: one update per epoch
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 / 16] * 3)  # batch of 8
    # One of the 40 photos cannot be read; an epoch has them all.
    assert [row["unreadable"] for row in rows] == [1, 1, 1]
    layers, sizes = rows[-1]["violation"], sizes_of_resnet8()
    assert layers.keys() == sizes.keys()
    weighted = np.average(list(layers.values()), weights=[sizes[name] for name in layers])
    assert rows[-1]["cfs_relative"] == pytest.approx(weighted, rel=1e-4)
    assert summary == Summary.read(workdir)
    assert (summary.experiment, summary.constraint) == ("cifar10_resnet20", "binary")
    assert (summary.method, summary.bits_per_weight) == ("cbp", 1)
    assert (summary.top1, summary.cfs) == (rows[-1]["top1"], rows[-1]["cfs"])
    assert summary.file_top1 == summary.top1  # read back from the packed file
    assert summary.bytes_file == (workdir / "weights.safetensors").stat().st_size
    for name in ("training", "weights_layer1_0_conv1_kernel", "weights_layer3_0_conv2_kernel"):
        assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    for tag in (b"loss", b"top1", b"cfs_relative", b"violation/layer3/0/conv2/kernel"):
        assert tag in events


def sizes_of_resnet8():
    """The weights of each constrained kernel, from the architecture."""
    sizes = {}
    for stage, (features_in, features) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
        sizes[f"layer{stage}/0/conv1/kernel"] = 9 * features_in * features
        sizes[f"layer{stage}/0/conv2/kernel"] = 9 * features * features
    return sizes


def test_sigterm_saves_and_ends_cleanly(interrupted):
    steps = sorted(int(path.name) for path in (interrupted / "checkpoints").iterdir())
    assert steps == [2, 4, 5, 6, STOPPED]
    assert [row["step"] for row in read_metrics(interrupted)] == [5]
    assert not (interrupted / "summary.json").exists()


def test_a_stopped_run_resumes_as_if_never_stopped(copy, uninterrupted, capsys):
    # As after a crash: a line of metrics is cut off, and a later one will come again.
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 15, "loss": 1.0}\n{"epoch": 4, "st')
    train_and_evaluate(digits_config(), copy)
    assert f"step {STOPPED} of {STEPS}" in capsys.readouterr().out
    assert_same_run(copy, uninterrupted)


def test_a_run_killed_before_it_measured_an_epoch(uninterrupted, tmp_path):
    """The checkpoint of an epoch's end is older than its evaluation, and the row is missing."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > 2 * STEPS_PER_EPOCH:
            shutil.rmtree(folder)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text(lines[0])
    train_and_evaluate(digits_config(), workdir)
    assert_same_run(workdir, uninterrupted)


def test_a_finished_run_is_left_as_it_is(uninterrupted, tmp_path, capsys):
    """Rerun as a requeue does, whatever the places of its data; another config goes on."""
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    before = sorted((str(path), path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    summary = train_and_evaluate(digits_config(workers=0), workdir)
    assert summary == Summary.read(workdir)
    assert "finished before" in capsys.readouterr().out
    after = sorted((str(path), path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    assert after == before
    train_and_evaluate(digits_config(epochs=EPOCHS + 1), workdir)
    assert read_metrics(workdir)[-1]["epoch"] == EPOCHS + 1


def test_a_finished_run_measures_its_last_epoch_again(uninterrupted, tmp_path, capsys):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    (workdir / "summary.json").unlink()
    train_and_evaluate(digits_config(), workdir)
    assert f"step {STEPS} of {STEPS}" in capsys.readouterr().out
    assert_same_run(workdir, uninterrupted)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(copy, uninterrupted):
    newest = copy / "checkpoints" / str(STOPPED)
    files = (path for path in newest.rglob("*") if path.is_file())
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.warns(UserWarning, match=f"step {STOPPED} in .* cannot be read"):
        train_and_evaluate(digits_config(), copy)
    assert_same_run(copy, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 16}, "batch_size +32 +16 +no"),
        ({"seed": 1}, "seed +0 +1 +no"),
        ({"method": "no_window"}, "method +cbp +no_window +no"),
        ({"constraint": "binary"}, "constraint +ternary +binary +no"),
        ({"phase": "pretrain"}, "phase +post_train +pretrain +no"),
        ({"network": "small_mlp", "width": 8}, "network +small_conv +small_mlp +no"),
        ({"steps_per_epoch": 4}, "steps_per_epoch=5, not 4"),
    ],
)
def test_a_run_is_not_resumed_as_another(copy, changes, message):
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(digits_config(**changes), copy)
    assert sorted(copy.rglob("*")) == before


def test_a_network_of_other_sizes_is_refused(copy):
    with pytest.raises(checkpoints.AnotherTreeError, match="another weights"):
        train_and_evaluate(digits_config(channels=4), copy)


def test_a_run_stopped_between_two_epochs(uninterrupted, tmp_path, monkeypatch):
    """It has measured the epoch, though no checkpoint was due; the row stays."""
    append = Workdir.append_metrics

    def append_and_kill(folder, row):
        append(folder, row)
        os.kill(os.getpid(), signal.SIGTERM)

    config = digits_config(checkpoint_epochs=2, checkpoint_steps=0)
    monkeypatch.setattr(Workdir, "append_metrics", append_and_kill)
    with pytest.raises(loop.Stopped):
        train_and_evaluate(config, tmp_path)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["5"]
    with pytest.raises(ValueError, match="has taken 5 steps, and its config asks for 5: raise"):
        train_and_evaluate(digits_config(epochs=1), tmp_path)
    train_and_evaluate(config, tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_run_stopped_in_its_last_evaluation(uninterrupted, tmp_path, monkeypatch, number, status):
    """It does not go on with the packed file and the figures."""
    append = Workdir.append_metrics

    def append_and_stop(folder, row):
        append(folder, row)
        if row["step"] == STEPS:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Workdir, "append_metrics", append_and_stop)
        with pytest.raises(loop.Stopped) as stopped:
            train_and_evaluate(digits_config(), tmp_path)
    assert stopped.value.code == status
    assert not {"summary.json", "weights.safetensors"} & {path.name for path in tmp_path.iterdir()}
    train_and_evaluate(digits_config(), tmp_path)
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("content", [None, b"x", b"PK\x03\x04 cut off"])
def test_weights_for_the_histograms_may_be_missing(copy, uninterrupted, content):
    (copy / "weights_before.npz").unlink()
    if content is not None:
        (copy / "weights_before.npz").write_bytes(content)
    with pytest.warns(UserWarning, match=r"the histograms lack the weights before: .*npz"):
        train_and_evaluate(digits_config(), copy)
    assert_same_run(copy, uninterrupted)
    assert (copy / "figures" / "weights_conv2_kernel.png").exists()


def test_a_changed_config_is_reported(copy, capsys):
    train_and_evaluate(digits_config(epochs=2), copy)
    assert "another config (saved -> asked): epochs 3 -> 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "web"}, "data='web' is none of"),
        ({"batch_size": 12}, "cannot be shared by 8 devices"),
        ({"batch_size": 48}, "40 training images are fewer than batch_size=48"),
        ({"network": "lenet"}, "lenet"),
        ({"fsdp": 3}, "fsdp=3 does not divide"),
        ({"num_classes": 1000}, "the data have 4 classes"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(photos, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(photos_config(photos, **changes), tmp_path / "run")


def test_random_weights_are_not_post_trained_unasked(tmp_path):
    """The run is refused before the data are opened: here there are none."""
    nothing = tmp_path / "nothing"
    with pytest.raises(FileNotFoundError, match=r"no weights to post-train"):
        train_and_evaluate(photos_config(nothing, pretrained=""), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nothing"):  # "random" gets as far as the data
        train_and_evaluate(photos_config(nothing), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="no_such"):
        train_and_evaluate(digits_config(pretrained="no_such.pth"), tmp_path / "run")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    config = digits_config(phase="pretrain", pretrain_learning_rate=1e30)
    with pytest.raises(FloatingPointError, match="Lower --config"):
        train_and_evaluate(config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())  # none with such weights


def test_the_learning_rate_is_logged_as_it_was_applied(tmp_path):
    train_and_evaluate(digits_config(lr_decay_window=2, lr_decay=0.25), tmp_path)
    rates = [row["learning_rate"] for row in read_metrics(tmp_path)]
    assert rates == pytest.approx([0.03, 0.03 / 4, 0.03 / 4])


def test_evaluation_of_a_run_gives_its_summary(of_photos):
    workdir, summary = of_photos
    scores = evaluate.evaluate_run(restore.restore(workdir))
    assert (scores["step"], scores["images"], scores["unreadable"]) == (15, 15, 1)
    assert scores["cfs"] == pytest.approx(summary.cfs, rel=1e-5)
    assert scores["top1"] == pytest.approx(summary.top1)


def test_a_run_of_eight_devices_is_evaluated_on_one(of_photos, environment):
    workdir, summary = of_photos
    flags = (f"--workdir={workdir}", "--batch_size=3")
    code, printed = run_script("evaluate.py", *flags, environment=environment)
    assert code == 0, printed
    assert f"top-1 {summary.top1:.2%}, top-5 {summary.top5:.2%} on 15 images" in printed
    assert f"CFS {summary.cfs:.2e}" in printed
    assert "1 images could not be read" in printed


def test_latent_and_quantized_weights_are_evaluated_apart(uninterrupted):
    """With the labels that the latent weights choose, the quantized ones make mistakes."""
    run = restore.restore(uninterrupted)
    model = nnx.merge(run.graphdef, run.state.params, run.state.batch_stats)
    model.eval()
    batch = dict(next(run.batches()))
    images = run.preprocess(batch, jax.random.key(0))
    labels = np.argmax(np.asarray(model(images)), axis=1).astype(np.int32)
    batch["label"] = np.where(batch["label"] < 0, batch["label"], labels)
    accuracy = setup.make_evaluate(run.graphdef, run.preprocess)
    relabelled = run._replace(accuracy=lambda *weights: accuracy(*weights, [batch]))
    assert evaluate.evaluate_run(relabelled, latent=True)["top1"] == 1
    assert evaluate.evaluate_run(relabelled)["top1"] < 1


def test_weights_come_from_a_run_or_a_file(of_photos, photos, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    workdir, _ = of_photos
    config = settle(photos_config(photos, pretrained=str(workdir)))
    of_run = setup.make_network(config, config.pretrained)
    saved = read_state(workdir)[".params['layer1'][0]['conv1']['kernel']"]
    assert np.array_equal(of_run.params["layer1"][0]["conv1"]["kernel"], saved)
    model = models.create("resnet20", 4, depth=1, rngs=nnx.Rngs(1))
    names = torch_weights.to_torch(model, of_run.params, of_run.batch_stats)
    safetensors.save_file(names, tmp_path / "weights.safetensors")
    of_file = setup.make_network(config, str(tmp_path / "weights.safetensors"))
    jax.tree.map(np.testing.assert_array_equal, of_file.params, of_run.params)
    jax.tree.map(np.testing.assert_array_equal, of_file.batch_stats, of_run.batch_stats)
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        setup.make_network(config, str(tmp_path))


def test_evaluation_of_a_file(photos, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    model = models.create("resnet20", 4, depth=1, rngs=nnx.Rngs(3))
    _, params, batch_stats = models.split_model(model)
    file = tmp_path / "weights.safetensors"
    safetensors.save_file(torch_weights.to_torch(model, params, batch_stats), file)
    names = (
        "network",
        "depth",
        "data",
        "data_dir",
        "num_classes",
        "image_size",
        "resize",
        "workers",
    )
    config = photos_config(photos, dtype="float32")
    fields = {name: config[name] for name in (*names, "dtype", "batch_size")}
    scores = evaluate.evaluate_file({**fields, "pretrained": str(file)})
    model.eval()
    loader, hits = open_data(config), 0
    for batch in loader.evaluate(None):
        logits = model(loader.eval_preprocess(batch, jax.random.key(0)))
        hits += np.sum(np.argmax(np.asarray(logits), axis=1) == batch["label"])
    assert scores["top1"] == pytest.approx(hits / 15)
