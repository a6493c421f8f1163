"""A finished run turned into a file by the command, and the accuracy that is read back."""

import json
import re
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("onnxruntime", reason='needs the extra: pip install -e ".[test]"')

import digits
from common.input.open import open_data
from common.report import deploy
from common.training import restore as finished
from common.training import run as runner
from run_support import ROOT, make_config

import cbp_jax


def export(workdir, *flags):
    command = [
        sys.executable,
        str(ROOT / "experiments" / "export.py"),
        f"--workdir={workdir}",
        *flags,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def top1(printed):
    return float(re.search(r"top-1 ([\d.]+)%, .* read back from the file", printed)[1]) / 100


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Of the digits, under all constraints, cut short."""
    workdir = tmp_path_factory.mktemp("digits")
    config = digits.get_config()
    config.update(
        {
            "epochs": 6,
            "pretrain_epochs": 3,
            "steps_per_epoch": 10,
            "patience": 1,
            "constraint": "ternary",
        }
    )
    digits.main(config, str(workdir))
    return workdir


@pytest.fixture(scope="module")
def long(photos, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("long")
    runner.run(
        "imagenet_resnet18",
        make_config(photos, preflight=False, constraint="two_bit_shift"),
        workdir,
    )
    return workdir


def test_small_run_as_a_packed_file(small, tmp_path):
    file = tmp_path / "file"
    code, printed = export(small, "--format=packed", "--round", f"--output={file}")
    assert code == 0, printed
    packed = cbp_jax.load_packed(file)
    assert packed == cbp_jax.load_packed(
        small / "weights.safetensors"
    )  # which the run itself ended with
    assert packed.tensors["conv2/kernel"].constraint == cbp_jax.ternary()
    assert {"bn1/scale", "batch_stats/bn1/mean"} <= set(packed.tensors)
    assert top1(printed) == pytest.approx(
        json.loads((small / "summary.json").read_text())["top1"], abs=1e-4
    )
    assert f"{file.stat().st_size / 1000:.1f} kB, " in printed


def evaluate(workdir, *flags):
    command = [
        sys.executable,
        str(ROOT / "experiments" / "evaluate.py"),
        f"--workdir={workdir}",
        *flags,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_small_run_is_evaluated(small):
    summary = json.loads((small / "summary.json").read_text())
    done = evaluate(small)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {summary['top1']:.2%}, top-5 {summary['top5']:.2%} of 899 images" in done.stdout
    assert (
        f"CFS {summary['cfs']:.2e}, CFS / scale {summary['cfs_relative']:.2e}, window 6"
        in done.stdout
    )
    latent = evaluate(small, "--weights=latent")
    assert latent.returncode == 0, latent.stderr
    assert latent.stdout.splitlines()[0] != done.stdout.splitlines()[0]


def test_the_folder_of_all_constraints_names_those_below(small, tmp_path):
    shutil.copytree(small, tmp_path / "all" / "ternary")
    shutil.copy(small / "config.json", tmp_path / "all")
    done = evaluate(tmp_path / "all")
    assert done.returncode == 1
    assert "name the folder of one, " in done.stderr
    assert str(tmp_path / "all" / "ternary") in done.stderr


def test_small_run_as_onnx(small):
    code, printed = export(small, "--format=onnx", "--weight_type=int2")
    assert code == 0, printed
    assert top1(printed) == pytest.approx(
        json.loads((small / "summary.json").read_text())["top1"], abs=1e-4
    )
    assert (small / "model.onnx").exists()


def test_weights_off_their_levels_are_refused(small, tmp_path):
    code, printed = export(small, f"--output={tmp_path / 'file'}")
    assert code == 1
    assert re.search(
        r"error: 2 of 2 constrained layers.*conv2/kernel: \d+ weights, by up to .* --round",
        printed,
        re.DOTALL,
    )
    assert not (tmp_path / "file").exists()


@pytest.mark.slow
def test_long_run(long, photos):
    config = finished.read_config(long, {})
    loader = open_data(config)
    setup, state = finished.restore(config, long, loader)
    expected = runner.Evaluation(setup, loader)(
        cbp_jax.quantize(state.params, state.opt_state), state.batch_stats
    )["top1"]
    code, printed = export(long, "--round", "--batch_size=8")
    assert code == 0, printed
    assert top1(printed) == pytest.approx(expected, abs=1e-4)
    code, printed = export(long, "--format=onnx", "--batch_size=8", "--limit=8")
    assert code == 0, printed
    assert re.search(r"of \d images, read back", printed)
    config = json.loads((long / "config.json").read_text())
    (long / "config.json").write_text(json.dumps({**config, "phase": "pretrain"}))
    code, printed = export(long)
    assert code == 1
    assert "it has no constraint" in printed


def test_what_is_no_finished_run(small, tmp_path):
    assert export(tmp_path) == (1, f"error: there is no config.json in {tmp_path}\n")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(small, unfinished)
    (unfinished / "summary.json").unlink()
    code, printed = export(unfinished)
    assert code == 1
    assert "no run ended" in printed


def test_a_file_of_another_network(small, tmp_path):
    packed = cbp_jax.load_packed(small / "weights.safetensors")
    tensors = {name: tensor for name, tensor in packed.tensors.items() if name != "conv3/kernel"}
    cbp_jax.save_packed(tmp_path / "file", cbp_jax.Packed(tensors))
    tree = cbp_jax.unpack(packed)
    statistics = tree.pop("batch_stats")
    with pytest.raises(cbp_jax.PackedError, match="no 'conv3/kernel'"):
        deploy.load(tmp_path / "file", tree, statistics)
