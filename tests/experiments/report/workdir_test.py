"""What a run leaves in its workdir."""

import jax.numpy as jnp
import numpy as np
import pytest
from common.config import ConfigError
from common.report import workdir as report
from common.report.workdir import Summary, Workdir, read_metrics
from common.training import restore
from common.training.run import train_and_evaluate
from common.training.settle import saved_config
from run_support import digits_config

import cbp_jax


def test_a_new_run_replaces_an_older_one(tmp_path):
    for epoch in (1, 2):
        workdir = Workdir(tmp_path)
        workdir.append_metrics({"epoch": epoch, "step": 5, "top1": 0.5})
        workdir.close()
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [2]


def test_metrics_are_json_whatever_happens(tmp_path):
    row = {"epoch": 1, "step": 5, "loss": float("nan"), "window": float("inf")}
    Workdir(tmp_path).append_metrics(row)
    written = (tmp_path / "metrics.jsonl").read_text()
    assert written == '{"epoch": 1, "step": 5, "loss": null, "window": null}\n'


def test_a_run_leaves_no_empty_metrics(tmp_path):
    """Neither at its start, nor where it was stopped before its first epoch ended."""
    workdir = Workdir(tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
    workdir.append_metrics({"epoch": 1, "step": 5})
    Workdir(tmp_path, step=5)
    assert read_metrics(tmp_path) == [{"epoch": 1, "step": 5}]
    Workdir(tmp_path, step=3)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_of_several_hosts_one_writes(tmp_path):
    workdir = Workdir(tmp_path / "run", writes=False)
    workdir.append_metrics({"epoch": 1, "step": 5})
    workdir.write_config(digits_config())
    workdir.save_weights("before", {"w": np.ones(3)})
    workdir.close()
    assert not (tmp_path / "run").exists()


def test_weights_are_kept_midway_where_half_of_the_constraint_is_met(tmp_path):
    """With multipliers that soon grow: the first epoch with half of the first CFS."""
    config = digits_config(epochs=14, multiplier_learning_rate=0.05, checkpoint_steps=0)
    train_and_evaluate(config, tmp_path)
    rows = read_metrics(tmp_path)
    half = next(row for row in rows if row["cfs_relative"] <= rows[0]["cfs_relative"] / 2)
    assert half != rows[-1]
    run = restore.restore(tmp_path)
    after = cbp_jax.relative_weights(run.state.params, run.state.opt_state)
    moments = [Workdir(tmp_path, step=999).load_weights(m) for m in ("before", "midway")]
    violations = [
        np.mean([2 * np.mean(np.abs(w - np.clip(np.round(w), -1, 1))) for w in moment.values()])
        for moment in (*moments, after)
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
    assert report.packed_bytes(params, state) == 3 + 4 + 10 + 4 + 16
    assert report.float32_bytes(params) == 4 * (21 + 25 + 4)
    per_channel = cbp_jax.cbp(constraint, scale_axis=-1).init(params)
    assert report.packed_bytes(params, per_channel) == 3 + 7 * 4 + 10 + 5 * 4 + 16


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "null",
        '{"epoch": 2}',
        '{"step": "x"}',
        "\x00\xff",
        "[" * 100_000,
        '{"step": 1e999}',
    ],
)
def test_a_damaged_line_of_metrics_is_left_out(line, tmp_path):
    rows = '{"epoch": 1, "step": 5}\n', '{"epoch": 3, "step": 15}\n'
    (tmp_path / "metrics.jsonl").write_bytes(f"{rows[0]}{line}\n{rows[1]}".encode("latin1"))
    with pytest.warns(UserWarning, match=r"line 2 of .*metrics.jsonl is damaged"):
        found = read_metrics(tmp_path)
    assert [row["step"] for row in found] == [5, 15]
    (tmp_path / "metrics.jsonl").write_text('{"step": "7"}\n')
    assert read_metrics(tmp_path) == [{"step": 7}]


@pytest.mark.parametrize("text", ["", "{", "null", "3", '{"experiment": 1}', "[" * 100_000])
def test_damaged_files_are_named(text, tmp_path):
    for name in ("summary.json", "config.json"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"summary.json is damaged"):
        Summary.read(tmp_path)
    if text != '{"experiment": 1}':
        with pytest.raises(ConfigError, match=r"config.json is damaged"):
            saved_config(tmp_path)
