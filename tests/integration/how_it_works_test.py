"""docs/how_it_works.md: its code runs, and what its text says holds."""

import contextlib
import io
import re

import matplotlib
import numpy as np
import pytest
from pages import ROOT

import cbp_jax

pytest.importorskip("sklearn", reason='needs the extra: pip install -e ".[test]"')

_CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(?::[^\n]*\n)*(.*?)^```", re.DOTALL | re.MULTILINE)


def run_cells(section):
    """Executes the page's cells above a section; returns their names and what they printed."""
    text, found, _ = (ROOT / "docs" / "how_it_works.md").read_text().partition(f"\n## {section}\n")
    assert found
    names, printed = {}, io.StringIO()
    with matplotlib.rc_context({"backend": "Agg"}), contextlib.redirect_stdout(printed):
        import matplotlib.pyplot as plt

        for cell in _CELL.findall(text):
            exec(cell, names)
        plt.close("all")
    return names, printed.getvalue()


@pytest.fixture(scope="module")
def basics():
    return run_cells("Why the loss is differentiated at the quantized weights")[0]


@pytest.mark.parametrize("name", cbp_jax.CONSTRAINTS)
def test_the_sawtooth(name, basics):
    constraint = cbp_jax.get_constraint(name)
    levels, w = np.array(constraint.levels), basics["w"]
    assert not np.any(constraint.violation(levels, 1.0))
    assert not np.any(constraint.violation_grad(levels, 1.0))
    distance = np.min(np.abs(w[:, None] - levels), axis=1)
    np.testing.assert_allclose(constraint.violation(w, 1.0), 2 * distance, atol=1e-6)
    # The derivative is that of the curve drawn, except in the cells that hold a kink.
    slope = np.diff(constraint.violation(w, 1.0)) / np.diff(w)
    ends = np.asarray(constraint.violation_grad(w, 1.0))
    smooth = ends[:-1] == ends[1:]
    assert smooth.mean() > 0.9
    np.testing.assert_allclose(slope[smooth], ends[:-1][smooth], atol=1e-2)
    assert set(ends) == {-2.0, 0.0, 2.0}


@pytest.mark.parametrize("window", [1, 2, 5, 20, np.inf])
def test_a_share_of_the_gap_is_free(window):
    ternary = cbp_jax.ternary()
    gap = np.linspace(0, 1, 100_001)[1:-1]  # between two levels
    free = np.asarray(ternary.violation_grad(gap, 1.0, window)) == 0
    np.testing.assert_allclose(free.mean(), 1 / window, atol=1e-3)
    if free.any():
        np.testing.assert_allclose(gap[free].mean(), 0.5, atol=1e-3)  # around the midpoint
    assert np.all(ternary.violation(np.array([-1.01, 1.01]), 1.0, window) > 0)


def test_how_the_window_grows(basics):
    def windows(name):
        optimizer, _ = basics["growths"][name]
        jnp = basics["jnp"]
        return basics["run"](
            optimizer,
            {"kernel": jnp.array([[0.5, -0.1]])},
            lambda params, batch: 0 * jnp.sum(params["kernel"]),
            jnp.zeros((60, 1)),
            lambda params, state, loss: cbp_jax.window(state),
        )[2]

    tens = [*range(1, 10), *range(10, 520, 10)]
    np.testing.assert_allclose(windows("by 1, then by 10"), tens[:60])
    halves = [*range(1, 10), *10 * 1.5 ** np.arange(51)]
    np.testing.assert_allclose(windows("by 1, then by half"), halves, rtol=1e-4)
    course = np.asarray(windows("closing"))
    assert np.all(np.diff(course[:55]) > 0)
    assert np.isinf(course[57:]).all()  # 95% of 60 steps


class TestOneWeight:
    def test_under_ste_it_flips_about_the_midpoint(self, basics):
        path = basics["paths"]["STE"]
        # From the middle of the run on, and 0.3 on average.
        assert np.max(np.abs(path["weight"][200:])) < 0.15
        np.testing.assert_allclose(np.mean(path["forward"][200:]), basics["MINIMUM"], atol=0.02)

    def test_under_cbp_it_moves_alike_until_its_multiplier_grows(self, basics):
        ste, cbp = basics["paths"]["STE"], basics["paths"]["CBP"]
        alike = np.asarray(cbp["multiplier"]) == 0
        assert 100 < alike.sum() < 600
        np.testing.assert_array_equal(cbp["weight"][alike], ste["weight"][alike])
        # An update finds a violation only where the weight was out of the free zone.
        at = alike.sum()
        assert abs(cbp["weight"][at - 1]) >= 1 / cbp["g"][at]

    def test_a_multiplier_of_half_the_slope_lets_it_rise(self, basics):
        """Above 0 and constrained, a step is -rate * (0.7 - 2 * multiplier)."""
        path = {name: np.asarray(values) for name, values in basics["paths"]["CBP"].items()}
        rate = np.asarray([basics["schedule"](step) for step in range(len(path["weight"]))])
        w, moves = path["weight"][:-1], np.diff(path["weight"])
        inside = (w > 1 / path["g"][1:]) & (w < 1)
        assert inside.sum() > 200
        expected = -rate[1:] * (0.7 - 2 * path["multiplier"][1:])
        np.testing.assert_allclose(moves[inside], expected[inside], rtol=1e-3, atol=1e-6)

    def test_it_ends_on_the_cheaper_level(self, basics):
        path = basics["paths"]["CBP"]
        np.testing.assert_allclose(path["weight"][-1], 1, atol=1e-3)
        held = np.argmax(np.asarray(path["weight"]) > 0.9)
        assert 0.35 < path["multiplier"][held] < 0.65
        assert np.all(np.asarray(path["weight"][held:]) > 0.85)

    @pytest.mark.parametrize(("rate", "level"), [(0.03, 1), (1.0, -1)])
    def test_a_large_multiplier_holds_it_on_its_side(self, rate, level, basics):
        link = cbp_jax.cbp(
            "binary",
            steps_per_epoch=basics["STEPS"],
            patience=1,
            multiplier_learning_rate=rate,
            initial_window=np.inf,
            **basics["fixed_scale"],
        )
        optimizer = basics["optax"].chain(link, basics["optax"].sgd(basics["schedule"]))
        start = {"kernel": basics["jnp"].array([[-0.5]])}
        *_, path = basics["run"](
            optimizer, start, basics["parabola"], basics["every_step"], basics["follow"]
        )
        np.testing.assert_allclose(path["weight"][-1], level, atol=1e-3)


@pytest.mark.slow
def test_the_digits():
    names, printed = run_cells("By the number of steps")
    finals = {name: history for name, (*_, history) in names["runs"].items()}
    first = {name: float(np.mean(history["quantized"][:5])) for name, history in finals.items()}
    assert first["CBP"] > first["CBP, loss at latent"] + 3  # it catches up as the window closes
    assert float(finals["CBP, loss at latent"]["quantized"][-1]) > first["CBP"] - 2
    assert np.abs(finals["CBP"]["quantized"][-1] - finals["STE"]["quantized"][-1]) < 3

    accuracy, quantize = names["accuracy"], cbp_jax.quantize
    for name, (params, state, history) in names["runs"].items():
        lost = float(accuracy(quantize(params, state)) - accuracy(params))
        if name == "STE":
            assert history["cfs"][-1] > 0.1
            assert lost > 1  # it needs the quantizer
        else:
            assert history["cfs"][-1] < 1e-4
            assert lost == 0

    history = finals["CBP"]
    lagrangian, loss = np.asarray(history["lagrangian"]), np.asarray(history["loss"])
    grown = 1 + np.flatnonzero(np.diff(history["g"]) > 0)
    assert max(np.diff(grown)) == 3  # the patience
    assert 0 < len(names["early"]) < len(grown)
    assert np.all(lagrangian[grown[:3]] > lagrangian[grown[:3] - 1])  # updates lift it
    assert np.all(lagrangian > loss - 1e-6)
    np.testing.assert_allclose(lagrangian[-1], loss[-1], rtol=1e-2)

    assert names["moments"].shape == (names["EPOCHS"] + 1, 1024)
    assert re.search(r"^[1-9]\d?% end on another level than at first$", printed, re.MULTILINE)
    assert names["gif"].startswith(b"GIF89a")
    assert len(names["gif"]) < 500_000
