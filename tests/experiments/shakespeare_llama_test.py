"""The Llama on text as a run of the engine, and its study's config."""

import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import shakespeare_llama
from common import study
from common.config import OF_STUDIES, ConfigError
from common.input.open import open_data
from common.report.tables import results_table
from common.report.workdir import METHODS, Summary, read_metrics
from common.training import restore
from common.training.run import train_and_evaluate
from common.training.settle import settle
from common.training.setup import initial_state, make_setup
from flax import nnx

import cbp_jax


@pytest.fixture
def config(tmp_path):
    """Four steps of a tiny network on a text of two letters, which follow each other at random."""
    letters = np.random.default_rng(0).integers(97, 99, 4000).astype(np.uint8)
    (tmp_path / "text.txt").write_bytes(letters.tobytes())
    fields = shakespeare_llama.get_config().to_dict()
    config = ml_collections.ConfigDict({k: v for k, v in fields.items() if k not in OF_STUDIES})
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
    config = shakespeare_llama.get_config()
    assert set(config.methods) <= set(METHODS)
    for method in config.methods:
        config.method, config.pretrained = method, "random"
        settle(config)
    assert config.pretrain_epochs * config.steps_per_epoch == 2000


def test_the_study_runs_every_method_with_and_without_a_teacher():
    found = {
        entry.name: dict(entry.changes) for entry in study.entries(shakespeare_llama.get_config())
    }
    alone = [name for name in found if not name.endswith("_distilled")]
    assert alone == [
        "full_precision",
        *("ternary_ste", "ternary_closing", "ternary"),
        *("binary_ste", "binary_closing", "binary"),
    ]
    assert list(found) == alone + [f"{name}_distilled" for name in alone]
    for name in alone:
        assert "teacher" not in found[name]
        assert found[f"{name}_distilled"] == {**found[name], "teacher": "pretrained"}


@pytest.mark.parametrize("preset", shakespeare_llama.PRESETS)
def test_a_preset_is_a_network_that_ggufs_types_hold(preset):
    """And leaves alone what the command line sets."""
    config = shakespeare_llama.get_config()
    config.preset, config.depth, config.pretrained = preset, 3, "random"
    found = settle(shakespeare_llama.with_preset(config))
    assert found.width % 256 == found.hidden % 256 == found.heads % found.kv_heads == 0
    assert found.depth == 3
    assert (found.width > 256) == (preset == "gpu") == (found.dtype == "bfloat16")


def test_an_unknown_preset_is_refused():
    config = shakespeare_llama.get_config()
    config.preset = "tpu"
    with pytest.raises(ConfigError, match="preset='tpu' is none of '', gpu"):
        shakespeare_llama.with_preset(config)


def test_scales_per_output_are_float16_numbers(config):
    """Under every method, those of the deployed weights."""
    for method in ("ste", "closing", "cbp", "rounding"):
        config.method = method
        setup = make_setup(settle(config), open_data(settle(config)))
        state, _ = initial_state(setup, 0)
        deployed = setup.deployed_state_fn(state.params, state.opt_state)
        scales = optax.tree_utils.tree_get(deployed, "weight_scale")
        scale = scales["blocks"][0]["mlp"]["down"]["kernel"]
        kernel = state.params["blocks"][0]["mlp"]["down"]["kernel"]
        expected = np.abs(np.float64(kernel)).mean(axis=0, keepdims=True).astype(np.float16)
        np.testing.assert_array_equal(scale, np.float32(expected))
