"""The recipe against its formulas in numpy, and the box."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax

settings = hypothesis.settings(max_examples=30, deadline=None)


def problem(seed=0):
    """Weights, some outside the bound, and the gradients of a sequence of steps."""
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (3, 4), "free": (4, 2), "bias": (4,)}
    params = {key: rng.normal(size=shape) * 0.6 for key, shape in shapes.items()}
    params["kernel"][0, 0], params["free"][0, 0] = 1.5, 1.5
    step = lambda: {key: rng.normal(size=shape) for key, shape in shapes.items()}  # noqa: E731
    return params, [step() for _ in range(30)]


def recipe(params, gradients, values, schedule, **changes):
    """`cbp_sgd` as its docstring has it; `rate` is a function of the step."""
    given = {**DEFAULTS, **changes}
    clip, momentum, bound = given["clip"], given["momentum"], given["bound"]
    params, velocity = dict(params), {key: np.zeros_like(w) for key, w in params.items()}
    for step, (gradient, value) in enumerate(zip(gradients, values, strict=True)):
        gradient = schedule(params, gradient, value)
        rate = given["rate"](step)
        if schedule.window >= given["decay_window"]:
            rate *= given["lr_decay"]
        for key, w in params.items():
            g = gradient[key] if clip is None else np.clip(gradient[key], -clip, clip)
            g = g + given["decay"] * w * (key in given["decayed"])
            velocity[key] = g if momentum is None else momentum * velocity[key] + g
            params[key] = w - rate * velocity[key]
            if key in schedule.levels and bound is not None:
                params[key] = np.clip(params[key], -bound, bound)
    return params


def follow(optimizer, params, gradients, values):
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, params)
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient, value in zip(gradients, values, strict=True):
            updates, state = update(gradient, state, params, value=value)
            params = optax.apply_updates(params, updates)
        return jax.device_get((params, state))


DEFAULTS = {
    "clip": 1.0,
    "decay": 1e-4,
    "decayed": ("kernel", "free"),
    "momentum": 0.9,
    "bound": 1.0,
    "rate": lambda step: 0.1,
    "lr_decay": 0.1,
    "decay_window": 20,
}
MASK = {"kernel": True, "free": False, "bias": False}


@pytest.mark.parametrize(
    ("ours", "formulas"),
    [
        ({}, {}),
        ({"momentum": None}, {"momentum": None}),
        ({"gradient_clip": None}, {"clip": None}),
        ({"gradient_clip": 0.3}, {"clip": 0.3}),
        ({"weight_bound": None}, {"bound": None}),
        ({"weight_bound": 0.25}, {"bound": 0.25}),
        ({"weight_decay": 0.3}, {"decay": 0.3}),
        ({"weight_decay": 0.0}, {"decay": 0}),
        (
            {"weight_decay": 0.3, "decay_mask": {"kernel": False, "free": False, "bias": True}},
            {"decay": 0.3, "decayed": ("bias",)},
        ),
        (
            {"weight_decay": 0.3, "decay_mask": True},
            {"decay": 0.3, "decayed": ("kernel", "free", "bias")},
        ),
        (
            {"weight_decay": 0.3, "decay_mask": cbp_jax.select("kernel")},
            {"decay": 0.3, "decayed": ("kernel",)},
        ),
        ({"lr_decay": 0.5, "lr_decay_window": 4}, {"lr_decay": 0.5, "decay_window": 4}),
        (
            {"learning_rate": optax.cosine_decay_schedule(0.2, 25)},
            {"rate": lambda i: 0.1 * (1 + np.cos(np.pi * min(i, 25) / 25))},
        ),
        ({"multiplier_optimizer": optax.sgd(0.1)}, {"ascent": reference.Descent(0.1)}),
        ({"initial_window": 20.0}, {"initial_window": 20.0}),
        ({"window_growth": lambda g: 3 * g}, {"growth": lambda g: 3 * g}),
    ],
    ids=" ".join,
)
def test_recipe(ours, formulas):
    params, gradients = problem()
    values = np.sin(np.arange(30))
    when = {"steps_per_epoch": 2, "patience": 2}
    arguments = {"learning_rate": 0.1, "multiplier_learning_rate": 0.05, "mask": MASK, **when}
    optimizer = cbp_jax.cbp_sgd(constraint="ternary", **{**arguments, **ours})
    of_schedule = {"ascent": reference.Adam(0.05), **when}
    changes = dict(formulas)
    for key in ("ascent", "initial_window", "growth"):
        if key in changes:
            of_schedule[key] = changes.pop(key)
    scales = {"kernel": np.mean(np.abs(params["kernel"]))}
    schedule = reference.Schedule({"kernel": (-1, 0, 1)}, scales, params, **of_schedule)
    expected = recipe(params, gradients, values, schedule, **changes)
    result, state = follow(optimizer, params, gradients, values)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    for key in params:
        close(result[key], expected[key], err_msg=key)
    close(state.cbp.multipliers["kernel"], schedule.multipliers["kernel"])
    assert cbp_jax.window(state) == schedule.window


def test_the_learning_rate_drops_with_the_window_of_the_same_call():
    """The window grows at the start of the third call, which already takes the small step."""
    params = {"w": jnp.array([[0.5, -0.5]])}
    when = {"steps_per_epoch": 2, "patience": 1, "initial_window": 10.0}
    plain = {"momentum": None, "weight_decay": 0.0, "multiplier_learning_rate": 0.0}
    optimizer = cbp_jax.cbp_sgd(1.0, "binary", **when, **plain)
    state, update, steps = optimizer.init(params), jax.jit(optimizer.update), []
    for _ in range(4):
        updates, state = update({"w": jnp.full((1, 2), 0.125)}, state, params, value=1.0)
        steps.append(float(updates["w"][0, 0]))
    np.testing.assert_allclose(steps, [-0.125, -0.125, -0.0125, -0.0125], rtol=1e-6)


SCHEDULE = optax.linear_schedule(1.0, 0.0, 8)


@pytest.mark.parametrize(
    ("rate", "initial_window", "expected"),
    [
        (0.5, 1.0, [0.5] * 6),
        (jnp.float32(0.5), 9.0, [0.5, 0.5, 0.5, 0.5, 0.05, 0.05]),
        (SCHEDULE, 1.0, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375]),
        (SCHEDULE, 10.0, [1.0, 0.875, 0.075, 0.0625, 0.05, 0.0375]),
        (SCHEDULE, 20.0, [0.1, 0.0875, 0.075, 0.0625, 0.05, 0.0375]),
    ],
    ids=["constant", "array, decayed", "schedule", "schedule, decayed", "decayed from the start"],
)
def test_state_holds_the_applied_learning_rate(rate, initial_window, expected):
    """After each call the rate it applied; after init the one that the first call will apply."""
    params = {"w": jnp.array([[0.5, -0.5]])}
    optimizer = cbp_jax.cbp_sgd(
        rate,
        "binary",
        steps_per_epoch=2,
        patience=1,
        initial_window=initial_window,
        momentum=None,
        weight_decay=0.0,
        multiplier_learning_rate=0.0,
        weight_bound=None,
    )
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    rates = [optax.tree_utils.tree_get(state, "learning_rate")]
    for _ in expected:
        updates, state = update({"w": jnp.full((1, 2), 0.125)}, state, params, value=1.0)
        rates.append(optax.tree_utils.tree_get(state, "learning_rate"))
        np.testing.assert_array_equal(updates["w"], np.full((1, 2), -0.125) * rates[-1])
    np.testing.assert_allclose(rates, [expected[0], *expected], rtol=1e-6)
    assert {(r.shape, r.dtype, r.weak_type) for r in rates} == {((), jnp.dtype("float32"), False)}


def test_no_two_arrays_of_the_recipe_share_a_buffer():
    rate, params = jnp.float32(0.1), {"w": jnp.array([[0.5, -0.5]])}
    state = cbp_jax.cbp_sgd(rate, "binary").init(params)
    leaves = jax.tree.leaves((rate, params, state))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_defaults_of_the_signature():
    """The paper's numbers, in a first step by hand."""
    params = {"w": jnp.array([[-2.0, -1.0, 0.25, 0.75]]), "bias": jnp.array([3.0])}
    optimizer = cbp_jax.cbp_sgd(0.1, "ternary")
    gradient = {"w": jnp.array([[0.5, 5.0, -5.0, 0.0]]), "bias": jnp.array([-4.0])}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params, value=1.0)
    # The outermost weight has multiplier 1e-4 and constraint gradient -2; its bound is -1.
    moved = np.array([[-1.0, -1.0, 0.25 + 0.1 * (1 - 0.25e-4), 0.75 - 0.1 * 0.75e-4]])
    np.testing.assert_allclose(params["w"] + updates["w"], moved, rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], [0.1], rtol=1e-6)


@pytest.mark.parametrize("bound", [0, -1.0])
def test_wrong_weight_bound(bound):
    with pytest.raises(ValueError, match="weight_bound must be positive"):
        cbp_jax.cbp_sgd(0.1, "binary", weight_bound=bound)


def test_refuses_what_the_link_refuses():
    with pytest.raises(ValueError, match="patience"):
        cbp_jax.cbp_sgd(0.1, "binary", patience=0)
    with pytest.raises(ValueError, match="unknown constraint"):
        cbp_jax.cbp_sgd(0.1, "binry")
    optimizer, params = cbp_jax.cbp_sgd(0.1, "binary"), {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(params, optimizer.init(params))


# The box


HALVES = ["bfloat16", "float16"]
FLOATS = ["float32", *HALVES]


def move_into_box(lower, upper, w, u):
    link = cbp_jax.keep_params_in_box(lower, upper)
    moved, _ = link.update(u, link.init(w), w)
    return moved, optax.apply_updates(w, moved)


# The bounds may be arrays. Under jit they are, so one program serves all boxes.
BOXES = {"eager": move_into_box, "jit": jax.jit(move_into_box)}


@pytest.mark.parametrize("how", BOXES)
@pytest.mark.parametrize("update_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@settings
@hypothesis.example(seed=323, box=(0, 1), reach=0.001)  # updates below float16's normal numbers
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1),
    box=st.tuples(st.integers(-64, 63), st.integers(1, 64)),
    reach=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_the_box(dtype, update_dtype, how, seed, box, reach):
    lower, upper = box[0] / 16, min(sum(box), 64) / 16  # exact in all dtypes
    rng = np.random.default_rng(seed)
    w = np.where(rng.random(256) < 0.9, rng.uniform(lower, upper, 256), rng.uniform(-8, 8, 256))
    w, u = jnp.asarray(w, dtype), jnp.asarray(rng.normal(size=256) * reach, update_dtype)
    moved, new = BOXES[how](lower, upper, w, u)
    assert (moved.dtype, new.dtype) == (update_dtype, dtype)
    moved, result = np.asarray(moved, np.float64), np.asarray(new, np.float64)
    assert np.all((result >= lower) & (result <= upper))
    exact = np.asarray(w, np.float64) + np.asarray(u, np.float64)
    inside = (exact >= lower) & (exact <= upper)
    np.testing.assert_array_equal(moved[inside], np.asarray(u, np.float64)[inside])
    # What would leave ends at the bound, up to the rounding of both dtypes, which below their
    # smallest normal numbers is absolute.
    infos = jnp.finfo(dtype), jnp.finfo(update_dtype)
    coarse = max(float(info.eps) for info in infos)
    smallest = max(float(info.smallest_normal) for info in infos)
    ends = np.clip(exact, lower, upper)
    largest = np.maximum(np.abs(ends), np.abs(np.asarray(w, np.float64)))
    assert np.all(np.abs(result - ends)[~inside] <= 2 * coarse * largest[~inside] + smallest)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bound", [0.3, 0.7, 0.01])
def test_a_bound_that_the_dtype_cannot_hold_is_not_passed(dtype, bound):
    w = jnp.zeros(2, dtype)
    _, new = move_into_box(-bound, bound, w, jnp.array([9, -9], dtype))
    result = np.asarray(new, np.float64)
    assert np.all(np.abs(result) <= bound)
    assert np.all(np.abs(result) >= bound * (1 - float(jnp.finfo(dtype).eps)))


def test_the_box_in_float64():
    with jax.enable_x64(True):
        w, u = jnp.array([0.9, -0.95, 0.1, 5.0]), jnp.array([0.2, -0.1, 0.3, 0.0])
        moved, result = jax.device_get(move_into_box(-1.0, 1.0, w, u))
        np.testing.assert_allclose(result, [1, -1, 0.4, 1], rtol=1e-15)
        assert np.all(np.abs(result) <= 1)
        assert moved[2] == 0.3


def test_the_mask_of_a_box():
    half, nine = jnp.array([0.5]), jnp.array([9.0])
    params = {"a": half, "b": {"c": half, "d": half}, "n": jnp.array([3])}
    updates = {"a": nine, "b": {"c": nine, "d": nine}, "n": jnp.array([4])}
    for mask, expected in [
        (None, [1, 1, 1, 7]),
        ({"a": False, "b": True, "n": False}, [9.5, 1, 1, 7]),
        (cbp_jax.select("b/c"), [9.5, 1, 9.5, 7]),
    ]:
        link = cbp_jax.keep_params_in_box(-1.0, 1.0, mask)
        moved, _ = link.update(updates, link.init(params), params)
        leaves = jax.tree.leaves(optax.apply_updates(params, moved))
        np.testing.assert_array_equal(leaves, np.float32(expected)[:, None])


def test_a_box_as_the_last_link_of_a_chain():
    box = cbp_jax.keep_params_in_box(-0.5, 0.5)
    optimizer = optax.chain(cbp_jax.cbp("binary"), optax.sgd(1.0), box)
    params, gradient = {"w": jnp.array([[0.5, -0.25]])}, {"w": jnp.array([[-1.0, 0.125]])}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params, value=1.0)
    np.testing.assert_allclose(params["w"] + updates["w"], [[0.5, -0.375]], rtol=1e-6)


def test_wrong_boxes():
    for bounds in [(1.0, -1.0), (1.0, 1.0)]:
        with pytest.raises(ValueError, match="lower bound must be below"):
            cbp_jax.keep_params_in_box(*bounds)
    link = cbp_jax.keep_params_in_box(-1.0, 1.0)
    with pytest.raises(ValueError, match="needs the parameters"):
        link.update(jnp.ones(2), link.init(jnp.ones(2)))
