"""The checks before a run."""

import jax
import jax.numpy as jnp
import pytest
from common.training import preflight
from common.training.run import train_and_evaluate
from run_support import digits_config


def test_memory_is_checked_before_the_first_step():
    line = preflight.check_memory(2**30, 4 * 2**30)
    assert line == "the step needs 1.00 of 4.00 GiB per device"
    with pytest.raises(
        MemoryError,
        match=r"needs 4\.00 of 4\.00 GiB .* lower --config\.batch_size, .* --config\.fsdp",
    ):
        preflight.check_memory(4 * 2**30, 4 * 2**30)
    assert preflight.available_memory() > 2**20
    compiled = (
        jax.jit(lambda x, y: (x + y, y), donate_argnums=0)
        .lower(jnp.zeros(2**20), jnp.zeros(2**20))
        .compile()
    )
    # two arguments and two results of 4 MiB, one of which takes the place of the donated argument
    assert preflight.memory_needed(compiled) == pytest.approx(3 * 2**22, rel=0.01)


def test_a_run_reports_what_it_checked(tmp_path, capsys, monkeypatch):
    train_and_evaluate(digits_config(epochs=1, preflight=True), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "preflight: a batch in" in printed
    assert "0 of it unreadable; the step needs 0." in printed
    assert "% on 899 validation images, 0 unreadable" in printed
    monkeypatch.setattr(preflight, "available_memory", lambda: 2**10)
    with pytest.raises(MemoryError, match=r"lower --config\.batch_size"):
        train_and_evaluate(digits_config(epochs=1, preflight=True), tmp_path / "other")
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
