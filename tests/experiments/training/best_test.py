"""The best checkpoint: which it is, that nothing evicts it, and what reads it."""

import shutil
import subprocess
import sys

import evaluate
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from common.report.workdir import read_metrics
from common.training import restore, run, setup
from common.training.best import Best
from common.training.restore import Record
from common.training.run import train_and_evaluate
from common.training.settle import settle
from common.training.step import init_state
from run_support import EPOCHS, ROOT, STEPS_PER_EPOCH, digits_config
from same_run import assert_same_run

RECORD = Record(images=100, steps_per_epoch=STEPS_PER_EPOCH)


def state_of(step):
    params = {"kernel": jnp.full((3, 2), float(step))}
    return init_state(params, {}, optax.sgd(0.1))._replace(step=jnp.int32(step))


def open_best(workdir, resumes=True, **changes):
    config = {"data": "digits", "best_cfs": 0.01, **changes}
    return Best(workdir, ml_collections.FrozenConfigDict(config), resumes)


def offer(best, *rows):
    """Offers rows at steps 5, 10, ...; returns those that were saved."""
    saved = []
    for epoch, row in enumerate(rows, 1):
        step, before = 5 * epoch, best.figures
        row = {"epoch": epoch, "step": step, "top1": 0.5, "eval_loss": 1.0, **row}
        best.offer(state_of(step), RECORD, row)
        if best.figures is not before:
            saved.append(step)
    best.close()
    return saved


def steps_in(workdir):
    names = [path.name for path in (workdir / "best" / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdecimal())  # kills leave others


@pytest.mark.parametrize(
    ("changes", "rows", "saved"),
    [
        ({}, [{"top1": 0.1}, {"top1": 0.5}, {"top1": 0.5}, {"top1": 0.4}], [5, 10]),
        # Where multipliers bring weights to their levels, most of the way must be done.
        (
            {},
            [
                {"window": 1.0, "cfs_relative": 0.5, "top1": 0.9},
                {"window": 9.0, "cfs_relative": 0.01, "top1": 0.6},
                {"window": 9.0, "cfs_relative": 0.02, "top1": 0.8},
                {"window": np.inf, "cfs_relative": 0.0, "top1": 0.7},
            ],
            [10, 20],
        ),
        ({}, [{"cfs_relative": 0.5}], [5]),  # of ste, whose weights stay off their levels
        ({"data": "text"}, [{"eval_loss": 2.0}, {"eval_loss": 1.5}, {"top1": 0.9}], [5, 10, 15]),
        ({}, [{"eval_loss": np.nan, "top1": 0.9}, {"top1": 0.1}], [10]),
    ],
)
def test_which_epoch_is_the_best(tmp_path, changes, rows, saved):
    best = open_best(tmp_path, **changes)
    assert offer(best, *rows) == saved
    assert steps_in(tmp_path) == saved[-1:]  # one alone
    again = open_best(tmp_path, **changes)
    again.restore(state_of(0))
    assert again.figures == best.figures
    assert again.figures["step"] == saved[-1]


def test_the_best_of_a_run_that_went_another_way(tmp_path):
    """Resumed from before it: what is better takes its place though its step is lower."""
    assert offer(open_best(tmp_path), *[{"top1": 0.1 * epoch} for epoch in range(1, 5)])[-1] == 20
    best = open_best(tmp_path)
    best.restore(state_of(0))
    assert offer(best, {"top1": 0.3}, {"top1": 0.6}) == [10]
    assert steps_in(tmp_path) == [10]


def test_one_that_cannot_be_read_is_put_aside(tmp_path):
    offer(open_best(tmp_path), {"top1": 0.9})
    shutil.rmtree(tmp_path / "best" / "checkpoints" / "5" / "weights")
    best = open_best(tmp_path)
    with pytest.warns(UserWarning, match="the next epoch that counts is the best"):
        best.restore(state_of(0))
    assert offer(best, {"top1": 0.1}) == [5]
    names = sorted(path.name for path in (tmp_path / "best" / "checkpoints").iterdir())
    assert names == ["5", "damaged_5"]


def test_a_new_run_removes_that_of_an_older_one(tmp_path):
    offer(open_best(tmp_path), {"top1": 0.9})
    best = open_best(tmp_path, resumes=False)
    assert offer(best, {"top1": 0.1}) == [5]


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    """A run whose third epoch is worse, and whose fourth ends in NaN; it keeps one checkpoint."""
    workdir, row_of, calls = tmp_path_factory.mktemp("diverged"), run.epoch_row, []

    def worse(state, *arguments):
        row = row_of(state, *arguments)
        calls.append(row)
        return {**row, "top1": (0.5, 0.8, 0.6)[len(calls) - 1]}

    def poisoned(*arguments):
        step = setup_step(*arguments)

        def train_step(state, batch):
            state, loss = step(state, batch)
            nan = jnp.where(state.step > 3 * STEPS_PER_EPOCH + 1, jnp.nan, 1)
            return state._replace(params=jax.tree.map(lambda w: nan * w, state.params)), loss

        return train_step

    setup_step = run.make_train_step
    config = digits_config(epochs=5, keep_checkpoints=1, checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "epoch_row", worse)
        patch.setattr(run, "make_train_step", poisoned)
        with pytest.raises(FloatingPointError, match=r"not finite at step 17: params/\S+"):
            train_and_evaluate(config, workdir)
    return workdir


def test_a_diverging_run_evicts_neither_the_best_nor_the_newest(diverged):
    assert steps_in(diverged) == [2 * STEPS_PER_EPOCH]
    assert [path.name for path in (diverged / "checkpoints").iterdir()] == ["16"]
    assert [row["step"] for row in read_metrics(diverged)] == [5, 10, 15]
    assert not (diverged / "summary.json").exists()
    assert not (diverged / "weights.safetensors").exists()


def test_the_best_is_evaluated_and_starts_other_runs(diverged):
    """`WORKDIR/best` is the workdir of a run."""
    found = restore.restore(diverged / "best")
    assert int(found.state.step) == 2 * STEPS_PER_EPOCH
    scores, row = evaluate.evaluate_run(found), read_metrics(diverged)[1]
    assert scores["loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
    assert scores["cfs"] == pytest.approx(row["cfs"], rel=1e-5)
    config = settle(digits_config(pretrained=str(diverged / "best")))
    network = setup.make_network(config, config.pretrained)
    jax.tree.map(np.testing.assert_array_equal, network.params, found.state.params)


def test_it_is_on_disk_before_a_later_checkpoint(tmp_path, monkeypatch):
    """From which the run would resume, and not measure that epoch again."""
    save, epoch_row, seen = run.save_state, run.epoch_row, []

    def better(state, *arguments):
        return {**epoch_row(state, *arguments), "top1": int(state.step) / STEPS_PER_EPOCH}

    def save_later(checkpoints, state, record):
        if step := int(state.step) - 1:
            seen.append(step in steps_in(tmp_path))
        save(checkpoints, state, record)

    monkeypatch.setattr(run, "epoch_row", better)
    monkeypatch.setattr(run, "save_state", save_later)
    train_and_evaluate(digits_config(steps_per_epoch=1, figures=False), tmp_path)
    assert seen == [True, True]


KILLED = """
import os, sys
from pathlib import Path
from common.training import best, run
from run_support import EPOCHS, STEPS_PER_EPOCH, digits_config

moment, workdir = sys.argv[1:]
save = best.save_state

def save_or_die(checkpoints, state, record):
    last = int(state.step) == EPOCHS * STEPS_PER_EPOCH
    if last and moment == "before":
        os._exit(9)
    save(checkpoints, state, record)
    if last:
        os._exit(9)

best.save_state = save_or_die
run.train_and_evaluate(digits_config(), Path(workdir))
"""


@pytest.mark.parametrize("moment", ["before", "while"])
def test_killed_between_an_evaluation_and_the_end_of_saving(tmp_path, moment):
    """Every epoch is better than the one before, so that the last is to be saved."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    summary = train_and_evaluate(digits_config(), whole)
    assert steps_in(whole) == [summary.best["step"]] == [EPOCHS * STEPS_PER_EPOCH]
    paths = [ROOT / "experiments", ROOT / "tests" / "support", ROOT]
    code = f"import sys\nsys.path[:0] = {list(map(str, paths))}\n{KILLED}"
    command = [sys.executable, "-c", code, moment, str(killed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 9, done.stderr[-3000:]
    assert steps_in(killed)[0] == (EPOCHS - 1) * STEPS_PER_EPOCH
    train_and_evaluate(digits_config(), killed)
    assert_same_run(killed, whole)
