"""Failure score, report and histogram against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from flax import nnx

import cbp_jax

MAPPING = {"a": "binary", "b/kernel": "two_bit_shift", "c": cbp_jax.uniform(6)}


@functools.cache
def setup(**arguments):
    rng = np.random.default_rng(1)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32),
        "b": {
            "kernel": jnp.asarray(rng.normal(size=(4, 2, 6)) * 0.1, jnp.float32),
            "bias": jnp.ones(6),
        },
        "c": jnp.asarray(rng.normal(size=(2, 2)) * 7, jnp.float32),
    }
    schedule = {"steps_per_epoch": 1, "patience": 1, "multiplier_optimizer": optax.adam(0.1)}
    optimizer = cbp_jax.cbp(MAPPING, **schedule, **arguments)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for value in (1.0, 0.5, 0.25):  # so that the window is finite and the multipliers differ
        _, state = update(params, state, params, value=value)
    return params, state


def by_numpy(params, state):
    """Violation, scale and nearest index of each layer, in float64."""
    found = {}
    for path, name in MAPPING.items():
        *parents, leaf = path.split("/")
        w, scale = params, state.weight_scale
        for key in (*parents, leaf):
            w, scale = w[key], scale[key]
        levels, w = cbp_jax.get_constraint(name).levels, np.asarray(w, np.float64)
        scale = np.asarray(scale, np.float64)
        index = reference.nearest_index(levels, scale, w)
        found[path] = reference.violation(levels, scale, w), scale, index
    return found


# Whether it is compiled, and the axis that keeps its scales.
WAYS = pytest.mark.parametrize(
    ("compiled", "axis"),
    [(False, None), (True, None), (True, -1)],
    ids=["eager, per tensor", "jit, per tensor", "jit, per channel"],
)


@WAYS
def test_constraint_failure_score(compiled, axis):
    """The mean over all weights, so that large layers count for more, whatever the window."""
    params, state = setup(scale_axis=axis)
    layers, score = by_numpy(params, state).values(), cbp_jax.constraint_failure_score
    if compiled:
        score = jax.jit(score, static_argnames="relative")
    expected = np.mean(np.concatenate([v.ravel() for v, *_ in layers]))
    assert score(params, state) == pytest.approx(expected, rel=1e-6)
    expected = np.mean(np.concatenate([(v / scale).ravel() for v, scale, _ in layers]))
    assert score(params, state, relative=True) == pytest.approx(expected, rel=1e-6)
    assert score(params, state).shape == ()


def test_constraint_failure_score_by_hand():
    params = {"w": jnp.array([[1.0, -1.0, 0.5, -1.5]]), "v": jnp.array([[4.0, -4.0], [4.0, 4.0]])}
    state = cbp_jax.cbp("binary").init(params)  # of scales 1 and 4
    assert cbp_jax.constraint_failure_score(params, state) == (0 + 0 + 1 + 1) / 8
    moved = {**params, "v": params["v"] + jnp.array([[2.0, 0], [0, 0]])}
    assert cbp_jax.constraint_failure_score(moved, state) == (2 + 4) / 8
    assert cbp_jax.constraint_failure_score(moved, state, relative=True) == (2 + 1) / 8
    assert cbp_jax.constraint_failure_score(cbp_jax.quantize(moved, state), state) == 0


def test_score_of_many_bfloat16_weights_is_summed_in_float32():
    params = {"w": jnp.full((512, 512), 1.5, jnp.bfloat16)}
    state = cbp_jax.cbp("binary", scale_fn=lambda w, _: jnp.ones(())).init(params)
    assert cbp_jax.constraint_failure_score(params, state) == 1
    assert cbp_jax.constraint_failure_score(params, state).dtype == jnp.float32


@WAYS
def test_layer_report(compiled, axis):
    params, state = setup(scale_axis=axis)
    report = (jax.jit(cbp_jax.layer_report) if compiled else cbp_jax.layer_report)(params, state)
    expected, multipliers = by_numpy(params, state), jax.tree.leaves(state.multipliers)
    rows = zip(report.layers, expected.items(), multipliers, strict=True)
    for layer, (path, (violation, scale, _)), multiplier in rows:
        assert (layer.layer, layer.constraint) == (path, cbp_jax.get_constraint(MAPPING[path]).name)
        assert layer.weights == violation.size
        assert layer.scale == pytest.approx(np.mean(scale), rel=1e-6)
        assert layer.violation == pytest.approx(np.mean(violation / scale), rel=1e-5)
        assert layer.on_level == pytest.approx(np.mean(violation / scale / 2 <= 1e-2))
        assert layer.multiplier_mean == pytest.approx(np.mean(np.float64(multiplier)), rel=1e-5)
        assert layer.multiplier_max == np.max(multiplier)
        assert layer.bad_scales == 0
    violations, weights = zip(*((row.violation, row.weights) for row in report.layers), strict=True)
    score = cbp_jax.constraint_failure_score(params, state, relative=True)
    assert score == pytest.approx(np.average(violations, weights=weights), rel=1e-5)


def test_on_level_has_the_tolerance_of_pack():
    """A weight counts as on its level within 1% of the scale, where `pack` does not round."""
    offsets = jnp.array([[0.0, 0.009, -0.009, 0.011, -0.011, 0.5]])
    params = {"w": 2 + 2 * offsets}
    state = cbp_jax.cbp("binary", scale_fn=lambda w, _: jnp.full((), 2.0)).init(params)
    (layer,) = cbp_jax.layer_report(params, state).layers
    assert layer.on_level == 0.5
    assert cbp_jax.pack(params, state, round=True).rounding[0].moved == 3


def test_the_table():
    params = {"block": {"kernel": jnp.array([[1.0, -1.0, 0.5, -1.5]])}, "stem": jnp.ones((25, 40))}
    state = cbp_jax.cbp({"stem": "ternary", ".*": "binary"}).init(params)
    assert str(cbp_jax.layer_report(params, state)).splitlines() == [
        "layer         constraint  weights  scale  violation  on level (±1%)  multiplier mean  max",
        "------------  ----------  -------  -----  ---------  --------------  ---------------  ---",
        "block/kernel  binary            4      1        0.5          50.00%                0    0",
        "stem          ternary       1,000      1          0         100.00%                0    0",
        "window 1, 0 multiplier updates in 0 steps",
    ]


def footer(steps, **arguments):
    """The lines below the table after some steps."""
    params = {"w": jnp.array([[1.0, -2.0]])}
    link = cbp_jax.cbp("binary", **arguments)

    @jax.jit
    def step(state, value):
        return link.update(params, state, params, value=value)[1]

    state = link.init(params)
    for value in steps:
        state = step(state, value)
    return str(cbp_jax.layer_report(params, state)).splitlines()[3:]


def test_the_footer_shows_the_schedule():
    moved = footer([1.0] * 9, steps_per_epoch=2, patience=1)
    assert moved == ["window 5, 5 multiplier updates in 9 steps"]
    closed = footer([1.0] * 3, steps_per_epoch=1, patience=1, initial_window=float("inf"))
    assert closed == ["window inf, 3 multiplier updates in 3 steps"]


def test_the_footer_warns_of_a_schedule_that_does_not_move():
    """As the defaults do on a small problem: thousands of steps without a second update."""
    position, advice = footer([1.0] * 50)
    assert position == "window 1, 1 multiplier update in 50 steps"
    assert "steps_per_epoch * patience" in advice


def test_the_footer_counts_steps_without_a_value():
    lines = footer([1.0, float("nan"), 2.0], steps_per_epoch=1, patience=1)
    advice = "call optimizer.update(grads, state, params, value=loss)"
    assert lines[1] == f"1 of 3 steps had no finite value: {advice}"


def test_the_footer_of_several_links_is_that_of_the_one_furthest_behind():
    params = {"a": jnp.array([[1.0, -3.0]]), "c": jnp.array([[2.0, 1.0]])}
    links = {
        "one": cbp_jax.cbp("binary", steps_per_epoch=1, patience=1),
        "two": cbp_jax.cbp("ternary", steps_per_epoch=100),
    }
    optimizer = optax.multi_transform(links, {"a": "one", "c": "two"})
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(3):
        _, state = update(params, state, params, value=1.0)
    assert "window 1, 1 multiplier update in 3 steps" in str(cbp_jax.layer_report(params, state))


def test_a_scale_of_zero_is_flagged():
    fine = {"fine": jnp.ones((2, 2))}
    params = {"fresh": jnp.zeros((2, 2)), "dead": jnp.array([[0.0, 1.0], [0.0, 1.5]]), **fine}
    state = jax.jit(cbp_jax.cbp("binary", scale_axis=-1).init)(params)
    report = cbp_jax.layer_report(params, state)
    bad = {layer.layer: int(layer.bad_scales) for layer in report.layers}
    assert bad == {"fresh": 2, "dead": 1, "fine": 0}
    assert str(report).splitlines()[-1] == "scale 0 or not finite, so not constrained: dead, fresh"
    report_of_fine = cbp_jax.layer_report(fine, cbp_jax.cbp("binary").init(fine))
    assert "scale 0" not in str(report_of_fine)
    score = cbp_jax.constraint_failure_score(params, state, relative=True)
    assert score == pytest.approx((0.4 + 0.4) / 12)
    assert np.all(np.isfinite(jax.tree.leaves(report)))


@WAYS
def test_level_histogram(compiled, axis):
    params, state = setup(scale_axis=axis)
    histogram = jax.jit(cbp_jax.level_histogram) if compiled else cbp_jax.level_histogram
    histogram = histogram(params, state)
    assert histogram.keys() == MAPPING.keys()
    for path, (*_, index) in by_numpy(params, state).items():
        levels = cbp_jax.get_constraint(MAPPING[path]).levels
        counts = np.bincount(index.ravel(), minlength=len(levels))
        np.testing.assert_array_equal(histogram[path], counts)
        assert histogram[path].dtype == jnp.int32


def test_level_histogram_is_int32_under_x64():
    with jax.enable_x64(True):
        params = {"w": jnp.array([[1.0, -1.0, 1.0]])}
        histogram = cbp_jax.level_histogram(params, cbp_jax.cbp("binary").init(params))["w"]
        np.testing.assert_array_equal(histogram, [1, 2])
        assert histogram.dtype == jnp.int32


@pytest.mark.parametrize("axis", [None, -1], ids=["a tensor", "a channel"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_relative_weights(axis, compiled):
    params, state = setup(scale_axis=axis)
    relative = jax.jit(cbp_jax.relative_weights) if compiled else cbp_jax.relative_weights
    weights = {"a": params["a"], "b/kernel": params["b"]["kernel"], "c": params["c"]}
    found = relative(params, state)
    assert found.keys() == weights.keys()
    for path, (_, scale, _) in by_numpy(params, state).items():
        np.testing.assert_allclose(found[path], np.float64(weights[path]) / scale, rtol=1e-6)


def test_relative_weights_of_an_nnx_state_in_bfloat16_and_of_scale_zero():
    params = nnx.State({"w": nnx.Param(jnp.array([[0.5, -1.5]], jnp.bfloat16))})
    state = cbp_jax.cbp("binary").init(params)
    relative = cbp_jax.relative_weights(params, state)["w"]
    assert relative.dtype == jnp.float32
    np.testing.assert_array_equal(relative, [[0.5, -1.5]])
    unmeasured = jax.jit(cbp_jax.cbp("binary").init)({"w": jnp.zeros((1, 2))})
    relative = cbp_jax.relative_weights({"w": jnp.array([[3.0, -1.0]])}, unmeasured)["w"]
    np.testing.assert_array_equal(relative, [[3, -1]])


def test_several_links_and_none_constrained():
    params = {"a": jnp.array([[1.0, -3.0]]), "b": jnp.array([[2.0, 2.0, 2.0]])}
    links = {"one": cbp_jax.cbp("binary"), "two": cbp_jax.cbp("ternary")}
    state = optax.multi_transform(links, {"a": "one", "b": "two"}).init(params)
    assert cbp_jax.constraint_failure_score(params, state) == pytest.approx((2 + 2) / 5)
    assert [layer.layer for layer in cbp_jax.layer_report(params, state).layers] == ["a", "b"]
    nothing = cbp_jax.cbp("binary", mask=False).init(params)
    assert cbp_jax.constraint_failure_score(params, nothing) == 0
    assert cbp_jax.level_histogram(params, nothing) == {}
    assert len(str(cbp_jax.layer_report(params, nothing)).splitlines()) == 3
