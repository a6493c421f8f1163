"""Methods of post-training and distillation, as whole runs."""

import shutil

import numpy as np
import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

import evaluate
import export
from common.report.workdir import Summary, read_metrics
from common.training import restore
from common.training.run import train_and_evaluate
from run_support import STEPS_PER_EPOCH, digits_config
from same_run import assert_same_run, read_state

import cbp_jax


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("pretrained")
    train_and_evaluate(digits_config(phase="pretrain", pretrain_epochs=2), workdir)
    return workdir


def test_a_method_without_multipliers_has_no_window(pretrained, tmp_path):
    """Rounding: its scales, and so its file, are those of the weights at the end."""
    config = digits_config(method="rounding", pretrained=str(pretrained), optimizer="adamw")
    summary = train_and_evaluate(config, tmp_path)
    assert (summary.method, summary.constraint) == ("rounding", "ternary")
    assert summary.file_top1 == summary.top1
    run = restore.restore(tmp_path)
    packed = cbp_jax.load_packed(tmp_path / "weights.safetensors")
    for name in ("conv2", "conv3"):
        w = np.asarray(run.state.params[name]["kernel"])
        scale = packed.tensors[f"{name}/kernel"].scale
        np.testing.assert_allclose(scale, np.abs(w).mean(), rtol=1e-5)
    row = read_metrics(tmp_path)[-1]
    assert not {"window", "lagrangian"} & row.keys()
    scores = evaluate.evaluate_run(run)
    assert "window" not in scores
    assert scores["top1"] == summary.top1
    assert scores["cfs"] == pytest.approx(summary.cfs) == row["cfs"]


def test_full_precision_packs_nothing(pretrained, tmp_path):
    summary = train_and_evaluate(
        digits_config(method="full_precision", pretrained=str(pretrained)), tmp_path
    )
    assert (summary.method, summary.constraint) == ("full_precision", "full precision")
    assert (summary.bits_per_weight, summary.bytes_file) == (32, None)
    assert summary.full_precision_top1 == Summary.read(pretrained).top1
    assert not (tmp_path / "weights.safetensors").exists()
    assert "cfs" not in read_metrics(tmp_path)[-1]
    run = restore.restore(tmp_path)
    assert evaluate.evaluate_run(run)["top1"] == summary.top1
    with pytest.raises(ValueError, match="of method 'full_precision', without a constraint"):
        export.check_constrained(run, tmp_path)


def test_a_distilled_run_reads_its_teacher_again(pretrained, tmp_path):
    """Its checkpoints are those of a run without one; with its share at 0 it is such a run."""

    def config(**changes):
        return digits_config(method="parq", pretrained=str(pretrained), **changes)

    losses = {}
    for name, changes in {
        "none": {},
        "no_share": {"teacher": "pretrained", "distillation": 0.0},
        "distilled": {"teacher": "pretrained"},
        "the_same": {"teacher": str(pretrained)},
    }.items():
        train_and_evaluate(config(**changes), tmp_path / name)
        losses[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert losses["none"] == losses["no_share"] != losses["distilled"] == losses["the_same"]
    assert read_state(tmp_path / "none").keys() == read_state(tmp_path / "distilled").keys()

    # Resumes one epoch earlier, or not at all if the teacher has gone.
    workdir = shutil.copytree(tmp_path / "distilled", tmp_path / "resumed")
    for checkpoint in (workdir / "checkpoints").iterdir():
        if int(checkpoint.name) > 2 * STEPS_PER_EPOCH:
            shutil.rmtree(checkpoint)
    gone = shutil.copytree(workdir, tmp_path / "gone")
    train_and_evaluate(config(teacher="pretrained"), workdir)
    assert_same_run(workdir, tmp_path / "distilled")
    nowhere = digits_config(method="parq", pretrained="nowhere.pth", teacher="pretrained")
    with pytest.raises(FileNotFoundError, match=r"no weight file at nowhere\.pth"):
        train_and_evaluate(nowhere, gone)
