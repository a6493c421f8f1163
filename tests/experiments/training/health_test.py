"""Numbers that are not finite, dead layers, growing multipliers: named, stopped or survived."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.report.workdir import Summary, read_metrics
from common.training import restore, run
from common.training.run import train_and_evaluate
from run_support import STEPS_PER_EPOCH, digits_config

SICK = STEPS_PER_EPOCH + 3  # the step after which something happens


def train(workdir, change, **changes):
    """Trains with steps whose state passes through `change` from the step `SICK` on."""
    make_train_step = run.make_train_step

    def make(*arguments):
        step = make_train_step(*arguments)

        def changed(state, batch):
            state, loss = step(state, batch)
            return (change(state) if int(state.step) >= SICK else state), loss

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_train_step", make)
        return train_and_evaluate(digits_config(figures=False, **changes), workdir)


def poison(state, field, name, value):
    """Sets the first number of the leaves whose path contains a name."""

    def change(path, leaf):
        hit = name in jax.tree_util.keystr(path)
        return leaf.at[(0,) * leaf.ndim].set(value) if hit else leaf

    changed = jax.tree_util.tree_map_with_path(change, getattr(state, field))
    return state._replace(**{field: changed})


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (("params", "conv2", np.nan), "params/conv2/kernel"),
        (("params", "conv3", -np.inf), "params/conv3/kernel"),
        (("batch_stats", "['bn1']['var']", np.inf), "batch_stats/bn1/var"),
        (("opt_state", "multipliers['conv2']", np.inf), "opt_state/cbp/multipliers/conv2/kernel"),
        (("opt_state", "trace['conv1']", np.inf), "opt_state/sgd/2/trace/conv1/kernel"),
        (("opt_state", "lagrangian", np.nan), "opt_state/cbp/lagrangian_sum"),
        (("sums", "loss", np.nan), "loss"),
    ],
)
def test_what_is_not_finite_is_named_and_never_saved(tmp_path, where, message):
    with pytest.raises(
        FloatingPointError, match=f"at step {SICK}: {message}.* at step {SICK - 1},"
    ):
        train(tmp_path, lambda state: poison(state, *where), checkpoint_steps=1)
    assert restore.restore(tmp_path).state.step == SICK - 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [STEPS_PER_EPOCH]
    assert not {"summary.json", "weights.safetensors"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize(("length", "latest"), [(STEPS_PER_EPOCH, 10), (100, SICK + 10)])
def test_a_run_without_a_checkpoint_due_stops_soon(tmp_path, length, latest):
    """At the end of the epoch; of a long one, as soon as a loss is seen that is not finite."""
    changes = {"checkpoint_epochs": 9, "checkpoint_steps": 0, "steps_per_epoch": length}
    with pytest.raises(FloatingPointError, match="all was finite at step") as caught:
        train(tmp_path, lambda state: poison(state, "params", "conv2", np.nan), **changes)
    assert SICK <= int(str(caught.value).split()[4].rstrip(":")) <= latest
    assert len(read_metrics(tmp_path)) == (SICK - 1) // length


def test_weights_that_are_not_finite_from_the_start(tmp_path, monkeypatch):
    initial_state = run.initial_state

    def poisoned(*arguments):
        state, shardings = initial_state(*arguments)
        return poison(state, "params", "conv3", np.nan), shardings

    monkeypatch.setattr(run, "initial_state", poisoned)
    with pytest.raises(FloatingPointError, match="before the first step: params/conv3/kernel; che"):
        train_and_evaluate(digits_config(), tmp_path)


@pytest.mark.parametrize("method", ["cbp", "ste", "rounding", "full_precision"])
def test_a_layer_that_dies_is_named_once(tmp_path, capsys, method):
    """Its packed file holds zeros too; with `rounding` its scale is 0."""

    def kill(state):
        kernel = {"kernel": jnp.zeros_like(state.params["conv2"]["kernel"])}
        return state._replace(params={**state.params, "conv2": kernel})

    summary = train(tmp_path, kill, method=method)
    assert capsys.readouterr().out.count("warning") == 1
    assert summary == Summary.read(tmp_path)
    assert summary.file_top1 in (None, summary.top1)


def test_multipliers_that_grow_without_bound_are_named_once(tmp_path, capsys):
    train(tmp_path, lambda state: state, multiplier_learning_rate=1e6)
    printed = capsys.readouterr().out
    for layer in ("conv2", "conv3"):
        line = f"warning, epoch 1: {layer}/kernel: a multiplier is 1.0e+06: lower --config.multi"
        assert printed.count(line) == 1
    assert printed.count("warning") == 2


def test_a_validation_loss_that_is_not_finite_counts_for_nothing(tmp_path, capsys, monkeypatch):
    """As where activations overflow in float16; the weights may be sound."""
    epoch_row = run.epoch_row
    monkeypatch.setattr(
        run, "epoch_row", lambda *arguments: {**epoch_row(*arguments), "eval_loss": np.nan}
    )
    summary = train_and_evaluate(digits_config(figures=False), tmp_path)
    assert capsys.readouterr().out.count("validation: its loss is not finite") == 1
    assert summary.best is None
