"""A long run as a user starts it: what it writes, and that stopping it leaves no trace."""

import json
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

import evaluate
from common import models
from common.input.open import open_data
from common.models import torch_weights as pretrained
from common.report import workdir as report
from common.training import checkpoints, loop
from common.training import restore as finished
from common.training import run as runner
from common.training import setup as networks
from run_support import EPOCHS, ROOT, STEPS_PER_EPOCH, finish, make_config, start


@pytest.fixture(scope="module")
def uninterrupted(photos, environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    return workdir, *finish(start(photos, workdir, environment))


@pytest.fixture(scope="module")
def interrupted(photos, environment, tmp_path_factory):
    """Stopped by SIGTERM in the middle of its second epoch, while processes decode its photos; not gone on with yet."""
    workdir = tmp_path_factory.mktemp("interrupted")
    process = start(photos, workdir, environment, workers=1)
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "6").is_dir():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    return workdir, *finish(process)


def read_state(photos, workdir):
    """The newest state in a workdir, by names."""
    config = make_config(photos)
    loader = open_data(config)
    setup = runner.make_setup(config, loader.train_images)
    state, _ = loop.restore(
        checkpoints.Checkpoints(workdir / "checkpoints"),
        runner.initial_state(setup, config.seed)[0],
    )
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def assert_same_run(photos, workdir, other):
    """Weights, statistics, multipliers, moments, keys and counters, bit for bit, and every figure but the speed."""
    arrays, others = read_state(photos, workdir), read_state(photos, other)
    assert arrays[".step"] == STEPS_PER_EPOCH * EPOCHS
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)
    rows, other_rows = (
        [
            {name: value for name, value in row.items() if name != "images_per_second"}
            for row in report.Workdir.rows(folder)
        ]
        for folder in (workdir, other)
    )
    assert rows == other_rows


def test_a_run_writes_its_workdir(uninterrupted):
    workdir, printed, errors = uninterrupted
    rows = report.Workdir.rows(workdir)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["step"] for row in rows] == [5, 10, 15]
    assert [row["window"] for row in rows] == [1, 2, 3]  # patience 1: an update an epoch
    # One of the 40 photos cannot be read; an epoch has them all.
    assert [row["unreadable"] for row in rows] == [1, 1, 1]
    assert errors.count("train/n00/0.JPEG") == errors.count("val/n00/0.JPEG") == 1  # named once
    layers, sizes = rows[-1]["violation"], sizes_of_resnet20()
    assert layers.keys() == sizes.keys()
    assert rows[-1]["cfs_relative"] == pytest.approx(
        np.average(list(layers.values()), weights=[sizes[name] for name in layers]), rel=1e-4
    )
    summary = json.loads((workdir / "summary.json").read_text())
    assert (summary["experiment"], summary["constraint"], summary["bits_per_weight"]) == (
        "imagenet_resnet18",
        "binary",
        1,
    )
    assert (summary["top1"], summary["cfs"]) == (rows[-1]["top1"], rows[-1]["cfs"])
    assert summary["ste_top1"] is None
    for name in ("training", "weights_layer1_0_conv1_kernel", "weights_layer3_2_conv2_kernel"):
        assert (workdir / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    events = b"".join(path.read_bytes() for path in (workdir / "tensorboard").iterdir())
    for tag in (b"loss", b"top1", b"cfs_relative", b"violation/layer3/2/conv2/kernel"):
        assert tag in events
    assert "memory: the step needs" in printed
    assert "top-1 of the weights it starts from" in printed
    assert "100%" in errors
    assert "img/s" in errors


def sizes_of_resnet20():
    """The weights of each constrained kernel, from the architecture."""
    sizes = {}
    for stage, (features_in, features) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
        for block in range(3):
            first = features_in if block == 0 else features
            sizes[f"layer{stage}/{block}/conv1/kernel"] = 9 * first * features
            sizes[f"layer{stage}/{block}/conv2/kernel"] = 9 * features * features
    return sizes


def test_sigterm_saves_and_ends_cleanly(interrupted):
    workdir, printed, errors = interrupted
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert 6 <= steps[-1] < STEPS_PER_EPOCH * EPOCHS
    assert f"stopped at step {steps[-1]} of {STEPS_PER_EPOCH * EPOCHS}, saved" in printed
    assert "Traceback" not in errors
    assert not (workdir / "summary.json").exists()


def test_a_stopped_run_goes_on_as_if_never_stopped(
    photos, uninterrupted, interrupted, environment, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted[0], workdir)
    # As after a crash rather than a clean end: a line of metrics is cut off, and a later one will
    # come again.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "step": 15, "loss": 1.0}\n{"epoch": 4, "st')
    printed, _ = finish(start(photos, workdir, environment))
    assert "top-1 of the weights it starts from" not in printed  # it is known from the first part
    assert_same_run(photos, workdir, uninterrupted[0])


def test_a_run_killed_before_it_measured_an_epoch(photos, uninterrupted, environment, tmp_path):
    """The checkpoint at an epoch's end is from before its measurement: no time is left for that when a machine is taken away."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if int(folder.name) > 2 * STEPS_PER_EPOCH:
            shutil.rmtree(folder)
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text(lines[0])
    finish(start(photos, workdir, environment))
    assert_same_run(photos, workdir, uninterrupted[0])


def test_a_finished_run_may_be_started_again(photos, uninterrupted, environment, tmp_path):
    """It measures its last epoch again, and that is all."""
    workdir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], workdir)
    (workdir / "summary.json").unlink()
    printed, _ = finish(start(photos, workdir, environment))
    assert "step 15 of 15" in printed
    assert_same_run(photos, workdir, uninterrupted[0])
    before, after = (
        json.loads((folder / "summary.json").read_text()) for folder in (uninterrupted[0], workdir)
    )
    before.pop("seconds")
    after.pop("seconds")
    assert before == after


def test_a_run_of_eight_devices_is_read_by_one(photos, environment, tmp_path):
    summary = runner.run("x", make_config(photos, epochs=1), tmp_path)
    command = [
        sys.executable,
        str(ROOT / "experiments" / "evaluate.py"),
        f"--workdir={tmp_path}",
        "--batch_size=3",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {summary.top1:.2%}" in done.stdout
    # And it is where another run may begin, whatever devices that has.
    code = (
        "import sys\n"
        "import jax, numpy as np, pathlib\n"
        f"sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from common import models\n"
        "from common.training import setup as networks, step as train\n"
        "from flax import nnx\n"
        "model = nnx.eval_shape(lambda: models.create('resnet20', 4, rngs=nnx.Rngs(0)))\n"
        "params, _ = networks.weights_of_run(pathlib.Path(sys.argv[1]), *models.split_model(model)[1:])\n"
        "print(jax.device_count(), np.abs(params['fc']['kernel']).sum())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    devices, total = done.stdout.split()
    assert devices == "1"
    assert float(total) == pytest.approx(
        np.abs(read_state(photos, tmp_path)[".params['fc']['kernel']"]).sum(), rel=1e-5
    )


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    photos, uninterrupted, interrupted, environment, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(interrupted[0], workdir)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    largest = max(
        (path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    _, errors = finish(start(photos, workdir, environment))
    assert f"step {newest.name} in" in errors
    assert "cannot be read" in errors
    assert_same_run(photos, workdir, uninterrupted[0])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 16}, ValueError, "batch_size=8, not 16"),
        ({"seed": 1}, ValueError, "seed=0, not 1"),
        ({"method": "no_window"}, ValueError, "method=cbp, not no_window"),
        ({"steps_per_epoch": 4}, ValueError, "steps_per_epoch=5, not 4"),
        ({"constraint": "ternary"}, checkpoints.AnotherTreeError, r"binary(.|\n)*ternary"),
        ({"phase": "pretrain"}, checkpoints.AnotherTreeError, "another rest"),
    ],
)
def test_a_run_is_not_continued_as_another(photos, interrupted, tmp_path, changes, error, message):
    shutil.copytree(interrupted[0], tmp_path / "run")
    with pytest.raises(error, match=message):
        runner.run("x", make_config(photos, **changes), tmp_path / "run")


def test_what_a_config_cannot_say(photos, tmp_path):
    for changes, message in (
        ({"phase": "train"}, "phase='train' is none of"),
        ({"method": "magic"}, "method='magic' is none of"),
        ({"data": "web"}, "data='web' is none of"),
        ({"batch_size": 12}, "cannot be shared by 8 devices"),
        ({"batch_size": 48}, "40 training images are fewer than batch_size=48"),
        ({"network": "lenet"}, "lenet"),
        ({"fsdp": 3}, "fsdp=3 does not divide"),
        ({"epochs": 0}, "epochs=0"),
        ({"num_classes": 1000}, "the data have 4 classes"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.run("x", make_config(photos, **changes), tmp_path / "run")
    with pytest.raises(SystemExit, match="error: "):
        runner.main("x", make_config(tmp_path / "nothing"), str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="no_such"):
        runner.run("x", make_config(photos, pretrained="no_such.pth"), tmp_path / "run")


def test_random_weights_are_not_post_trained_unasked(photos, tmp_path):
    """It is refused before the data are opened: here there are none."""
    config = make_config(tmp_path / "nothing", pretrained="")
    message = r"no weights to post-train.*--config.pretrained=FILE.*resnet20.*phase=pretrain.*--config.pretrained=random"
    with pytest.raises(FileNotFoundError, match=message):
        runner.run("x", config, tmp_path / "run")
    with pytest.raises(
        FileNotFoundError, match="nothing"
    ):  # with "random" it gets as far as the data
        runner.run("x", make_config(tmp_path / "nothing"), tmp_path / "run")
    runner.run(
        "x",
        make_config(
            photos,
            pretrained="",
            phase="pretrain",
            pretrain_epochs=1,
            preflight=False,
            batch_size=8,
        ),
        tmp_path / "p",
    )


def test_evaluation_of_a_run_gives_its_summary(photos, uninterrupted, environment):
    workdir = uninterrupted[0]
    summary = json.loads((workdir / "summary.json").read_text())
    scores = evaluate.evaluate_run(finished.open_run(workdir, {}))
    assert scores["cfs"] == pytest.approx(summary["cfs"], rel=1e-5)
    assert (scores["step"], scores["images"], scores["unreadable"]) == (15, 15, 1)
    assert scores["top1"] == pytest.approx(summary["top1"])
    command = [sys.executable, str(ROOT / "experiments" / "evaluate.py"), f"--workdir={workdir}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {summary['top1']:.2%}" in done.stdout
    assert "of 15 images" in done.stdout
    assert f"CFS {summary['cfs']:.2e}" in done.stdout
    assert "1 images could not be read" in done.stdout


def test_latent_and_quantized_weights_are_evaluated_apart(photos, uninterrupted):
    """With labels that the latent weights choose, they are right, and the quantized ones need not be."""
    config = make_config(photos)
    loader = open_data(config)
    setup = runner.make_setup(config, loader.train_images)
    reader = checkpoints.Checkpoints(uninterrupted[0] / "checkpoints")
    state, _ = loop.restore(reader, runner.initial_state(setup, 0)[0])
    model = nnx.merge(setup.network.graphdef, state.params, state.batch_stats)
    model.eval()
    batch = next(loader.evaluate(None))
    batch["label"] = np.argmax(
        np.asarray(model(loader.eval_preprocess(batch, jax.random.key(0)))), axis=1
    ).astype(np.int32)
    evaluation = runner.Evaluation(setup, loader._replace(evaluate=lambda limit: iter([batch])))
    run = finished.open_run(uninterrupted[0], {})._replace(accuracy=evaluation)
    assert evaluate.evaluate_run(run, latent=True)["top1"] == 1


def test_weights_come_from_a_run_or_a_file(photos, uninterrupted, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    config = make_config(photos, pretrained=str(uninterrupted[0]))
    of_run = networks.make_network(config)
    saved = read_state(photos, uninterrupted[0])
    assert np.array_equal(
        of_run.params["layer1"][0]["conv1"]["kernel"],
        saved[".params['layer1'][0]['conv1']['kernel']"],
    )
    model = models.create("resnet20", 4, rngs=nnx.Rngs(1))
    names = pretrained.to_torch(model, of_run.params, of_run.batch_stats)
    safetensors.save_file(names, tmp_path / "weights.safetensors")
    config.pretrained = str(tmp_path / "weights.safetensors")
    of_file = networks.make_network(config)
    jax.tree.map(np.testing.assert_array_equal, of_file.params, of_run.params)
    jax.tree.map(np.testing.assert_array_equal, of_file.batch_stats, of_run.batch_stats)
    with pytest.raises(FileNotFoundError, match="not the workdir of a run"):
        networks.make_network(make_config(photos, pretrained=str(tmp_path)))


def test_evaluation_of_a_file(photos, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="needs safetensors")
    model = models.create("resnet20", 4, rngs=nnx.Rngs(3))
    _, params, batch_stats = models.split_model(model)
    safetensors.save_file(
        pretrained.to_torch(model, params, batch_stats), tmp_path / "weights.safetensors"
    )
    config = make_config(photos, phase="pretrain", pretrained=str(tmp_path / "weights.safetensors"))
    loader = open_data(config)
    hits = images = 0
    model.eval()
    for batch in loader.evaluate(None):
        logits = np.asarray(model(loader.eval_preprocess(batch, jax.random.key(0))))
        hits += int((logits.argmax(axis=1) == batch["label"]).sum())
        images += int((batch["label"] >= 0).sum())
    scores = evaluate.evaluate_file(config, loader)
    assert scores == {
        "top1": pytest.approx(hits / images),
        "top5": 1,
        "images": 15,
        "unreadable": 1,
    }


def test_synthetic_data_need_no_disk(tmp_path):
    config = make_config(tmp_path / "nothing", data="synthetic", num_classes=1000)
    loader = open_data(config)
    batch = next(loader.train(3))
    assert {name: array.shape for name, array in batch.items()} == {
        "image": (8, 16, 16, 3),
        "label": (8,),
        "jitter": (8, 3),
    }
    images = loader.train_preprocess(batch, jax.random.key(0))
    assert (images.shape, images.dtype) == ((8, 16, 16, 3), np.float32)
    assert sum(len(batch["label"]) for batch in loader.evaluate(None)) == loader.eval_images
    assert sum(len(batch["label"]) for batch in loader.evaluate(40)) == 40


def test_transform_input_follows_the_weights(tmp_path):
    import ml_collections

    config = ml_collections.ConfigDict(
        {"network": "googlenet", "pretrained": "", "transform_input": None}
    )
    for origin, expected in (
        ("", False),
        ("random", False),
        ("googlenet.pth", True),
        (str(tmp_path), False),
    ):
        copy = ml_collections.ConfigDict({**config.to_dict(), "pretrained": origin})
        networks.settle_options(copy)
        assert copy.transform_input is expected
    (tmp_path / "config.json").write_text('{"transform_input": true}')
    copy = ml_collections.ConfigDict({**config.to_dict(), "pretrained": str(tmp_path)})
    networks.settle_options(copy)
    assert copy.transform_input is True  # the run it continues from was built so
    fixed = ml_collections.ConfigDict(
        {**config.to_dict(), "pretrained": "googlenet.pth", "transform_input": False}
    )
    networks.settle_options(fixed)
    assert fixed.transform_input is False  # as the user says


def test_a_loss_that_is_not_finite_ends_the_run(photos, tmp_path):
    config = make_config(
        photos,
        phase="pretrain",
        pretrain_epochs=1,
        pretrain_learning_rate=1e30,
        warmup_epochs=0,
        preflight=False,
    )
    with pytest.raises(FloatingPointError, match="Lower --config"):
        runner.run("x", config, tmp_path)
    assert not list((tmp_path / "checkpoints").iterdir())  # none with such weights
