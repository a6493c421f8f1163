"""The Llama on text as a run of the engine, and its study's config."""

import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import text_llama
from common.report.tables import results_table
from common.report.workdir import METHODS, Summary, read_metrics
from common.training import restore
from common.training.run import train_and_evaluate
from common.training.settle import settle
from flax import nnx

import cbp_jax


@pytest.fixture
def config(tmp_path):
    """Four steps of a tiny network on a text of two letters, which follow each other at random."""
    letters = np.random.default_rng(0).integers(97, 99, 4000).astype(np.uint8)
    (tmp_path / "text.txt").write_bytes(letters.tobytes())
    fields = text_llama.get_config().to_dict()
    del fields["methods"]
    config = ml_collections.ConfigDict(fields)
    sizes = {"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "hidden": 24, "context": 16}
    short = {
        "batch_size": 8,
        "base_batch_size": 8,
        "eval_batch_size": 8,
        "steps_per_epoch": 2,
        "epochs": 2,
    }
    config.update({"text": str(tmp_path / "text.txt"), **sizes, **short})
    config.update({"method": "ste", "pretrained": "random", "warmup_steps": 1})
    return config


def test_a_run(config, tmp_path, monkeypatch):
    """Its loss and accuracies are those of the quantized weights, by their definition."""
    monkeypatch.setattr("common.training.run.draw_run", lambda *_: None)  # takes most of the time
    summary = train_and_evaluate(config, tmp_path / "run")
    rows, run = read_metrics(tmp_path / "run"), restore.restore(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4]
    assert len(rows[-1]["violation"]) == 7
    state = run.state
    weights = cbp_jax.quantize(state.params, state.opt_state)
    model = nnx.merge(run.graphdef, weights, state.batch_stats)
    text = np.frombuffer((tmp_path / "text.txt").read_bytes(), np.uint8)[3600:3800]
    logits = np.float64(model(jnp.asarray(text[: 12 * 16].reshape(12, 16).astype(np.int32))))
    labels = text[1 : 12 * 16 + 1].reshape(12, 16, 1)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    best = np.argsort(-logits, axis=-1)
    expected = {
        "eval_loss": -np.take_along_axis(logs, labels, -1).mean(),
        "top1": np.mean(best[..., :1] == labels),
        "top5": np.mean((best[..., :5] == labels).any(axis=-1)),
    }
    assert {name: rows[-1][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert summary == Summary.read(tmp_path / "run")
    assert summary.eval_loss == rows[-1]["eval_loss"]
    assert summary.file_top1 == summary.top1
    assert f" {summary.eval_loss:.3f} " in results_table([summary])
    assert int(state.sums.images) == 2 * 8  # windows, not tokens
    assert run.accuracy(weights, state.batch_stats)["images"] == 12


def test_training_learns_how_often_letters_come(config, tmp_path):
    """Nothing tells which of two comes next: the loss falls to ln 2, and no further."""
    changes = {"phase": "pretrain", "pretrain_epochs": 10, "steps_per_epoch": 10}
    config.update({**changes, "pretrain_learning_rate": 1e-2, "preflight": False})
    summary = train_and_evaluate(config, tmp_path / "run")
    assert summary.eval_loss == pytest.approx(np.log(2), abs=0.04)
    assert summary.top5 > 0.999


def test_the_study_has_a_config_for_every_method():
    config = text_llama.get_config()
    assert set(config.methods) <= set(METHODS)
    for method in config.methods:
        config.method, config.pretrained = method, "random"
        settle(config)
    assert config.pretrain_epochs * config.steps_per_epoch == 2000
