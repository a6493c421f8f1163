"""NaN, infinity, zero, and numbers at the ends of their range: what is survived, and how."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax
from cbp_jax.state import find_states

LAST = 2**31 - 1
PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.ones(2)}
GOOD = jax.tree.map(lambda w: 0.1 * w, PARAMS)
BAD = {**GOOD, "kernel": GOOD["kernel"].at[0, 0].set(jnp.nan)}
HUGE = {**GOOD, "kernel": GOOD["kernel"].at[0, 0].set(jnp.inf)}


def epochs(**arguments):
    return cbp_jax.cbp("binary", steps_per_epoch=2, patience=1, **arguments)


def train(optimizer, gradients, params=PARAMS):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        finite = all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradient))
        value = 1.0 if finite else np.nan
        updates, state = update(gradient, state, params, value=value)
        params = optax.apply_updates(params, updates)
    return params, state


def is_finite(tree):
    return all(np.all(np.isfinite(np.float64(leaf))) for leaf in jax.tree.leaves(tree))


# Gradients that are not finite


@pytest.mark.parametrize("bad", [BAD, HUGE])
def test_a_bad_gradient_reaches_its_own_weights_alone(bad):
    """Nothing of it goes into multipliers or the scale in its own step."""
    link = epochs()
    _, state = link.update(GOOD, link.init(PARAMS), PARAMS, value=1.0)
    updates, after = link.update(bad, state, PARAMS, value=np.nan)
    assert np.sum(~np.isfinite(updates["kernel"])) == 1
    assert is_finite((after.multipliers, after.multiplier_opt_state, after.weight_scale))
    assert int(after.skipped_values) == 1


@pytest.mark.parametrize("bad", [BAD, HUGE])
def test_apply_if_finite_around_cbp_skips_the_step_altogether(bad):
    optimizer = optax.apply_if_finite(optax.chain(epochs(), optax.sgd(0.1)), 3)
    params, state = train(optimizer, [GOOD, bad, GOOD, bad, GOOD])
    expected, expected_state = train(optax.chain(epochs(), optax.sgd(0.1)), [GOOD] * 3)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    (ours,), (theirs,) = find_states(state), find_states(expected_state)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_apply_if_finite_after_cbp_counts_the_step():
    """The weights survive too; the epoch has one step and one comparison fewer."""
    optimizer = optax.chain(epochs(), optax.apply_if_finite(optax.sgd(0.1), 3))
    params, state = train(optimizer, [GOOD, BAD, GOOD, BAD, GOOD])
    (ours,) = find_states(state)
    assert is_finite(params)
    assert (int(ours.count), int(ours.skipped_values)) == (5, 2)


@pytest.mark.parametrize("bad", [BAD, HUGE])
def test_apply_if_finite_inside_closing_keeps_the_course(bad):
    """Around it, a skipped step would put off the end, beyond that of the run."""
    gradients = [GOOD, GOOD, bad, *[GOOD] * 3, bad, *[GOOD] * 13]
    inside = cbp_jax.closing(optax.apply_if_finite(optax.sgd(0.1), 3), "binary", 20, closes_at=1)
    params, state = train(inside, gradients)
    assert is_finite(params)
    assert float(cbp_jax.constraint_failure_score(params, state)) == 0
    around = optax.apply_if_finite(cbp_jax.closing(optax.sgd(0.1), "binary", 20, closes_at=1), 3)
    params, state = train(around, gradients)
    assert is_finite(params)
    assert int(find_states(state)[0].count) == 18


# Layers and scales of 0


@pytest.mark.parametrize("window", [1.0, np.inf])
def test_a_layer_that_dies(window):
    """At 0, between two levels, it is free until the window is infinite; then it comes back."""
    link = epochs(multiplier_optimizer=optax.sgd(0.1), initial_window=window)
    _, state = train(link, [GOOD] * 8)
    params = {**PARAMS, "kernel": jnp.zeros((2, 2))}
    for _ in range(60):
        updates, state = link.update(jax.tree.map(jnp.zeros_like, GOOD), state, params, value=1.0)
        params = optax.apply_updates(params, jax.tree.map(lambda u: -0.01 * u, updates))
    assert is_finite((params, state.multipliers))
    assert np.all(np.abs(params["kernel"]) > 0) == np.isinf(window)
    np.testing.assert_allclose(cbp_jax.quantize(params, state)["kernel"], 1.625)
    with pytest.raises(ValueError, match="the scale of 'kernel' is 0, because all its weights are"):
        cbp_jax.refit_scales({**PARAMS, "kernel": jnp.zeros((2, 2))}, state)


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_a_scale_of_0_constrains_nothing(scale):
    """Under `jit`, where nothing is refused; a subnormal scale is 0 on every backend."""
    make = {"cbp": epochs, "ste": lambda scale_fn: cbp_jax.ste("binary", scale_fn=scale_fn)}
    for link in (make[name](scale_fn=lambda w, axes: scale) for name in make):
        state = jax.jit(link.init)(PARAMS)
        assert float(state.weight_scale["kernel"]) == 0
        updates, _ = link.update(GOOD, state, PARAMS, value=1.0)
        np.testing.assert_array_equal(updates["kernel"], GOOD["kernel"])


# float16


@pytest.mark.parametrize("scale", [1e-4, 3e-7, 2e-8])
def test_weights_on_levels_below_the_smallest_normal_float16(scale):
    constraint = cbp_jax.two_bit_shift()
    weights = jnp.linspace(-1, 1, 99) * scale
    on_level = constraint.quantize(jnp.asarray(weights, jnp.float16), scale)
    values = np.float16(np.array(constraint.levels, np.float32) * np.float32(scale))
    assert set(np.asarray(on_level).tolist()) <= set(values.tolist())
    violation = jax.jit(lambda w: constraint.violation(w, scale))(on_level)
    np.testing.assert_array_equal(violation, 0)
    np.testing.assert_array_equal(constraint.violation_grad(on_level, scale), 0)


@pytest.mark.parametrize("scale", [3e-6, 5e-5])
def test_closing_ends_on_subnormal_levels(scale):
    params = {"kernel": jnp.asarray(np.linspace(-2, 2, 12).reshape(3, 4) * scale, jnp.float16)}
    optimizer = cbp_jax.closing(optax.sgd(0.0), "two_bit_shift", 10)
    ours, state = train(optimizer, [params] * 10, params)
    assert float(cbp_jax.constraint_failure_score(ours, state)) == 0
    assert np.any(ours["kernel"] != 0)


def test_levels_that_overflow_float16():
    params = {"kernel": jnp.full((2, 2), 6e4, jnp.float16)}
    cbp_jax.cbp("binary").init(params)
    with pytest.raises(ValueError, match=r"levels of 'kernel' overflow float16: .* 9\.2"):
        cbp_jax.cbp(cbp_jax.uniform(2)).init(params)


# Multipliers and gradients without bound


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_multipliers_that_grow_without_bound_saturate(dtype):
    """Infinite ones would be NaN times a violation of 0."""
    rate = float(jnp.finfo(dtype).max) / 8
    link = epochs(multiplier_dtype=dtype, multiplier_optimizer=optax.sgd(rate))
    params = {**PARAMS, "kernel": jnp.array([[1.625, -2.0], [0.5, 3.0]])}
    state = link.init(PARAMS)
    for _ in range(80):
        updates, state = link.update(GOOD, state, params, value=1.0)
    assert is_finite((updates, state.multipliers))
    assert float(updates["kernel"][0, 0]) == pytest.approx(0.1)  # on its level
    assert np.all(np.abs(np.float64(updates["kernel"]).reshape(-1)[1:]) > 1e3)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_closing_with_gradients_whose_squares_leave_float32(size):
    """They have no force; the weights are on their levels in the end all the same."""
    gradients = jax.tree.map(lambda g: np.float32(size) * g, GOOD)
    optimizer = cbp_jax.closing(optax.sgd(0.0), "ternary", 20)
    params, state = train(optimizer, [gradients] * 20)
    assert float(state.mean_square["kernel"]) == 0
    assert is_finite((params, state.multipliers))
    assert float(cbp_jax.constraint_failure_score(params, state)) == 0


@pytest.mark.parametrize("size", [1e-18, 1.0, 1e18])
def test_the_root_mean_square_is_unbiased_from_the_first_step(size):
    optimizer = cbp_jax.closing(optax.sgd(1.0), "ternary", 20)
    gradients = jax.tree.map(lambda g: np.float32(size) * g, GOOD)
    for steps in (1, 2, 7):
        _, state = train(optimizer, [gradients] * steps)
        found = np.sqrt(float(state.mean_square["kernel"]) / (1 - 0.95**steps))
        expected = np.sqrt(np.mean(np.square(np.float64(gradients["kernel"]))))
        assert found == pytest.approx(expected, rel=1e-5)


# Counters and the course


@pytest.mark.parametrize("name", ["cbp", "cbp_sgd"])
def test_counters_at_the_end_of_int32(name):
    """They saturate; the schedule and the learning rate go on as they were."""
    rate = optax.piecewise_constant_schedule(0.1, {LAST - 1: 0.5})
    optimizer = {
        "cbp": lambda: epochs(),
        "cbp_sgd": lambda: cbp_jax.cbp_sgd(rate, "binary", steps_per_epoch=2, patience=1),
    }[name]()
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    counters = ("count", "skipped_values", "multiplier_updates")
    full = {field: jnp.int32(LAST) for field in counters}
    old = find_states(state)[0]._replace(**full)
    state = old if name == "cbp" else state._replace(cbp=old)
    for _ in range(4):
        _, state = update(GOOD, state, PARAMS, value=np.nan)
    (new,) = find_states(state)
    assert [int(getattr(new, field)) for field in counters] == [LAST] * 3
    assert (int(new.step_in_epoch), float(new.window)) == (0, 2.0)
    if name == "cbp_sgd":
        assert float(state.learning_rate) == pytest.approx(0.05)


@pytest.mark.parametrize("field", ["step_in_epoch", "patience_used"])
def test_epochs_and_patience_of_int32s_length(field):
    never = {"step_in_epoch": "steps_per_epoch", "patience_used": "patience"}[field]
    link = cbp_jax.cbp("binary", **{"steps_per_epoch": 1, "patience": 5, never: LAST})
    _, state = link.update(GOOD, link.init(PARAMS), PARAMS, value=1.0)
    state = state._replace(**{field: jnp.int32(LAST - 1)})
    _, state = link.update(GOOD, state, PARAMS, value=0.0)
    assert int(getattr(state, field)) == 0


def test_resuming_closing_with_another_number_of_steps():
    """The course starts anew from the share of the new number that has been taken."""
    inner, start = optax.sgd(0.01), cbp_jax.closing(optax.sgd(0.01), "ternary", 40)
    params, state = train(start, [GOOD] * 20)
    for steps in (100, 25, 15):
        update = jax.jit(cbp_jax.closing(inner, "ternary", steps).update)
        ours, resumed, windows = params, state, []
        for _ in range(max(steps - 20, 2)):
            updates, resumed = update(GOOD, resumed, ours)
            ours = optax.apply_updates(ours, updates)
            windows.append(float(resumed.window))
        share = min(20 / (0.95 * steps - 2), 1)
        assert windows[0] == pytest.approx(1 / (1 - share) if share < 1 else np.inf, rel=1e-5)
        assert windows == sorted(windows)
        assert np.isinf(windows[-1])
        assert float(cbp_jax.constraint_failure_score(ours, resumed)) == 0
