"""CBP by the number of steps, against its formulas in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax

LEVELS = {name: cbp_jax.get_constraint(name).levels for name in cbp_jax.CONSTRAINTS}
STEPS = 30


def problem(seed=0):
    """Weights, of which `kernel` is constrained, and the gradients of a sequence of steps."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (6, 4), "bias": (4,)}
    params = {key: rng.normal(size=shape) for key, shape in shapes.items()}
    gradients = [
        {key: rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 1) for key, shape in shapes.items()}
        for _ in range(STEPS)
    ]
    return params, gradients


def in_float32(seed=0):
    return jax.tree.map(jnp.float32, problem(seed))


def formulas(params, gradients, levels, *, closes_at=0.95, strength=10.0, rate=0.05):
    """The docstring's formulas around gradient descent; the trajectory of the kernel and window."""
    params, scale = dict(params), np.mean(np.abs(params["kernel"]))
    multiplier, mean_square, p = np.zeros_like(params["kernel"]), 0.0, 0.0
    steps, path = max(closes_at * len(gradients) - 2, 1), []
    for count, gradient in enumerate(gradients):
        w, g = params["kernel"], gradient["kernel"]
        p, after = min(count / steps, 1), min((count + 1) / steps, 1)
        window = np.inf if p == 1 else 1 / (1 - p)
        mean_square = 0.95 * mean_square + 0.05 * np.mean(g**2)
        size = np.sqrt(mean_square / (1 - 0.95 ** (count + 1)))
        rise = after**3 - p**3
        multiplier = (
            multiplier + strength * rise * reference.violation(levels, scale, w, window) / scale
        )
        force = size * multiplier * reference.violation_grad(levels, scale, w, window)
        moved = w - rate * (g + force)
        params["kernel"] = reference.quantize(levels, scale, w) if p == 1 else moved
        params["bias"] = params["bias"] - rate * gradient["bias"]
        path.append((params["kernel"], window))
    return params, multiplier, path


def follow(optimizer, params, gradients):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    path = []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        path.append((params["kernel"], state.window))
    return params, state, path


@pytest.mark.parametrize("constraint", cbp_jax.CONSTRAINTS)
@pytest.mark.parametrize("changes", [{}, {"closes_at": 0.5, "strength": 2.0}, {"closes_at": 1.0}])
def test_follows_the_formulas(constraint, changes):
    params, gradients = problem()
    expected, multiplier, expected_path = formulas(params, gradients, LEVELS[constraint], **changes)
    with jax.enable_x64(True):
        start = jax.tree.map(jnp.asarray, params)
        optimizer = cbp_jax.closing(optax.sgd(0.05), constraint, STEPS, **changes)
        ours, state, path = follow(optimizer, start, gradients)
    for (w, window), (expected_w, expected_window) in zip(path, expected_path, strict=True):
        np.testing.assert_allclose(w, expected_w, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(window, expected_window, rtol=1e-9)
    np.testing.assert_allclose(ours["bias"], expected["bias"], rtol=1e-12)
    np.testing.assert_allclose(state.multipliers["kernel"], multiplier, rtol=1e-9)
    assert isinstance(state.multipliers["bias"], optax.MaskedNode)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("inner", [optax.adamw(0.1), optax.sgd(0.05, momentum=0.9)])
def test_weights_end_exactly_on_their_levels(dtype, inner):
    params, gradients = problem()
    params, gradients = jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, gradients))
    optimizer = cbp_jax.closing(inner, "two_bit_shift", STEPS, scale_axis=-1)
    ours, state, path = follow(optimizer, params, gradients)
    assert float(cbp_jax.constraint_failure_score(ours, state)) == 0
    assert np.isinf(cbp_jax.window(state))
    closed = path[int(np.ceil(0.95 * STEPS)) - 1 :]
    for w, _ in closed:  # held, though gradients, momentum and weight decay would move them
        np.testing.assert_array_equal(np.float32(w), np.float32(ours["kernel"]))
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(np.float32(path[0][0]), np.float32(ours["kernel"]))
    jax.tree.map(
        np.testing.assert_array_equal, cbp_jax.unpack(cbp_jax.pack(ours, state), ours), ours
    )


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_course_has_no_unit(factor):
    """Under Adam, which has none either, a loss times a factor gives the same weights."""
    params, gradients = problem()
    optimizer = cbp_jax.closing(optax.adam(0.05, eps=0), "ternary", STEPS)
    with jax.enable_x64(True):
        start = jax.tree.map(jnp.asarray, params)
        scaled = [jax.tree.map(lambda g: factor * g, gradient) for gradient in gradients]
        ours, expected = (follow(optimizer, start, g)[0] for g in (scaled, gradients))
    np.testing.assert_allclose(ours["kernel"], expected["kernel"], rtol=1e-9)
    np.testing.assert_allclose(ours["bias"], expected["bias"], rtol=1e-9)


def test_a_gradient_that_is_not_finite_leaves_the_mean_of_squares():
    params, gradients = in_float32()
    optimizer = cbp_jax.closing(optax.apply_if_finite(optax.sgd(0.05), 3), "binary", STEPS)
    state = optimizer.init(params)
    _, state = optimizer.update(gradients[0], state, params)
    before = state.mean_square["kernel"]
    bad = jax.tree.map(lambda g: g * np.nan, gradients[1])
    updates, state = optimizer.update(bad, state, params)
    assert float(state.mean_square["kernel"]) == float(before) > 0
    assert np.all(np.isfinite(state.multipliers["kernel"]))
    assert not np.any(np.isnan(updates["kernel"]))


def test_further_arguments_reach_the_inner_optimizer():
    params, gradients = in_float32()
    inner = optax.contrib.reduce_on_plateau(patience=1, factor=0.5)
    optimizer = cbp_jax.closing(optax.chain(optax.sgd(0.05), inner), "binary", STEPS)
    state = optimizer.init(params)
    for gradient in gradients[:6]:
        _, state = optimizer.update(gradient, state, params, value=jnp.float32(1.0))
    assert float(optax.tree_utils.tree_get(state, "scale")) < 1


def test_counts_the_updates_that_multi_steps_emits():
    params, gradients = in_float32()
    micro = optax.MultiSteps(cbp_jax.closing(optax.sgd(0.05), "binary", STEPS), 2)
    state = micro.init(params)
    for gradient in gradients[:6]:
        updates, state = micro.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert int(state.inner_opt_state.count) == 3


def test_works_under_vmap_with_donation():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), in_float32(0)[0], in_float32(1)[0])
    gradients = jax.tree.map(lambda *x: jnp.stack(x), in_float32(0)[1], in_float32(1)[1])
    optimizer = cbp_jax.closing(optax.sgd(0.05), "ternary", STEPS)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @jax.vmap
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params, state = stacked, jax.vmap(optimizer.init)(stacked)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    for seed in range(2):
        single, single_gradients = in_float32(seed)
        expected = follow(optimizer, single, single_gradients)[0]
        np.testing.assert_allclose(params["kernel"][seed], expected["kernel"], rtol=1e-5)
    assert step._cache_size() == 1


def test_readers_take_its_state():
    params, gradients = in_float32()
    optimizer = cbp_jax.closing(optax.sgd(0.05), "binary", STEPS)
    ours, state, _ = follow(optimizer, params, gradients[:9])
    report = cbp_jax.layer_report(ours, state)
    assert report.multiplier_updates is None
    assert float(report.layers[0].multiplier_mean) > 0
    assert f"window {float(state.window):.4g} after 9 steps" in str(report)
    refitted = cbp_jax.refit_scales(ours, state)
    np.testing.assert_allclose(
        refitted.weight_scale["kernel"], np.mean(np.abs(ours["kernel"])), rtol=1e-6
    )
    assert cbp_jax.describe(state)["leaves"]["kernel"]["shape"] == [6, 4]
    cbp_jax.check_description(state, cbp_jax.describe(cbp_jax.cbp("binary").init(params)))


def test_a_layer_without_a_scale_is_left_alone():
    """Under jit, `init` cannot refuse a layer that is 0 throughout."""
    params, gradients = in_float32()
    params["kernel"] = jnp.zeros_like(params["kernel"])
    optimizer = cbp_jax.closing(optax.sgd(0.05), "binary", STEPS)
    state = jax.jit(optimizer.init)(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(
        params["kernel"], -0.05 * sum(g["kernel"] for g in gradients), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total_steps": 0}, "total_steps must be a whole number of at least 1, got 0"),
        ({"total_steps": 10.5}, "total_steps must be a whole number"),
        ({"closes_at": 0}, r"closes_at must be a share of the run, in \(0, 1\], got 0"),
        ({"closes_at": 1.5}, "closes_at must be a share"),
        ({"strength": -1.0}, "strength must be a number of at least 0, got -1.0"),
        ({"scale_axis": "last"}, "scale_axis must be an integer"),
        ({"constraint": "quinary"}, "binary"),
    ],
)
def test_arguments_are_checked(arguments, message):
    given = {"constraint": "binary", "total_steps": 10, **arguments}
    with pytest.raises(ValueError, match=message):
        cbp_jax.closing(optax.sgd(0.1), **given)


def test_parameters_and_gradients_are_checked():
    params, gradients = in_float32()
    optimizer = cbp_jax.closing(optax.sgd(0.1), "binary", 10)
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(gradients[0], state)
    with pytest.raises(ValueError, match="updates lack 'kernel', which is constrained"):
        optimizer.update({"bias": gradients[0]["bias"]}, state, params)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs_end_on_their_levels_where_they_can(steps):
    params, gradients = in_float32()
    optimizer = cbp_jax.closing(optax.sgd(0.05), "binary", steps)
    ours, state, _ = follow(optimizer, params, gradients[: max(steps, 3)])
    assert float(cbp_jax.constraint_failure_score(ours, state)) == 0


def test_optax_finds_the_copies_of_the_parameters():
    params, _ = in_float32()
    optimizer = cbp_jax.closing(optax.adam(0.05), "binary", STEPS)
    state = optimizer.init(params)
    marked = optax.tree_utils.tree_map_params(optimizer, lambda w: w + 1, state)
    np.testing.assert_array_equal(marked.multipliers["kernel"], np.ones((6, 4)))
    np.testing.assert_array_equal(marked.inner[0].mu["bias"], np.ones(4))
    assert float(marked.mean_square["kernel"]) == 0
    assert float(marked.weight_scale["kernel"]) == float(state.weight_scale["kernel"])


def test_the_count_saturates():
    params, gradients = in_float32()
    optimizer = cbp_jax.closing(optax.sgd(0.05), "binary", STEPS)
    state = optimizer.init(params)._replace(count=jnp.int32(2**31 - 1))
    _, state = optimizer.update(gradients[0], state, params)
    assert int(state.count) == 2**31 - 1
    assert float(jnp.max(jnp.abs(state.multipliers["kernel"]))) == 0
    assert np.isinf(state.window)


def test_a_link_inside_is_refused():
    inner = optax.chain(cbp_jax.ste("ternary"), optax.sgd(0.1))
    with pytest.raises(ValueError, match="inside closing has a link of cbp_jax in it"):
        cbp_jax.closing(inner, "binary", 10).init(in_float32()[0])
