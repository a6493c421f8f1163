"""The link against the design's state machine (`reference.Schedule`), and problems by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import cbp_jax

NAMES = ["binary", "ternary", "one_bit_shift", "two_bit_shift"]
MASK = {"a": True, "b": True, "free": False}


@functools.cache  # so that problems of one seed are one, and their steps compile once
class Regression:
    """Three linear least-squares layers, two of them constrained, with the gradient written out."""

    shapes = {"a": (3, 5, 2), "b": (2, 2, 4), "free": (4, 2)}  # noqa: RUF012

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.params = {key: rng.normal(size=shape) * 0.4 for key, shape in self.shapes.items()}
        self.x = {key: rng.normal(size=(6, shape[0])) for key, shape in self.shapes.items()}
        self.y = {key: rng.normal(size=(6, *shape[1:])) for key, shape in self.shapes.items()}

    def loss_and_gradient(self, weights):
        residual = {
            key: np.tensordot(self.x[key], w, 1) - self.y[key] for key, w in weights.items()
        }
        loss = sum(np.sum(r**2) for r in residual.values()) / 12
        return loss, {key: np.tensordot(self.x[key].T, r, 1) / 6 for key, r in residual.items()}

    def loss(self, weights):
        errors = (jnp.tensordot(self.x[key], w, 1) - self.y[key] for key, w in weights.items())
        return sum(jnp.sum(error**2) for error in errors) / 12


def scales(params, kept=()):
    """Mean absolute values of the constrained layers, one for each index of the kept axes."""

    def scale(w):
        axes = tuple(i for i in range(w.ndim) if i not in kept(w)) if kept else None
        return np.mean(np.abs(w), axis=axes, keepdims=bool(kept))

    return {key: scale(params[key]) for key in ("a", "b")}


LEARNING_RATE = 0.05


@functools.cache
def compiled_step(optimizer, problem):
    def train_step(params, state, offset):
        loss, grads = jax.value_and_grad(problem.loss)(cbp_jax.quantize(params, state))
        value = None if offset is None else loss + offset
        updates, state = optimizer.update(grads, state, params, value=value)
        return jax.tree.map(lambda w, u: w - LEARNING_RATE * u, params, updates), state

    return jax.jit(train_step)


def compare(optimizer, reference, problem, steps, offset=lambda step: 0.0):
    """Runs both from the same weights; the value is the loss plus an offset, or None."""
    with jax.enable_x64(True):
        expected = dict(problem.params)
        params = jax.tree.map(jnp.asarray, expected)
        state, train_step = optimizer.init(params), compiled_step(optimizer, problem)
        for step in range(steps):
            added = offset(step)
            params, state = train_step(params, state, added)
            loss, grads = problem.loss_and_gradient(reference.quantize(expected))
            total = reference(expected, grads, None if added is None else loss + added)
            expected = {key: w - LEARNING_RATE * total[key] for key, w in expected.items()}
            close = functools.partial(
                np.testing.assert_allclose, rtol=1e-9, atol=1e-9, err_msg=f"step {step}"
            )
            for key in expected:
                close(params[key], expected[key])
            for key in reference.multipliers:
                close(state.multipliers[key], reference.multipliers[key])
            close(state.window, reference.window)
            if reference.lagrangian_sum is not None:
                close(state.lagrangian_sum, reference.lagrangian_sum)
            for name in ("count", "step_in_epoch", "patience_used"):
                assert getattr(state, name) == getattr(reference, name)
            assert state.skipped_values == reference.skipped
        assert isinstance(state.multipliers["free"], optax.MaskedNode)
        return jax.device_get(state)


@functools.cache
def link(name, rate=3e-3, **arguments):
    return cbp_jax.cbp(name, mask=MASK, multiplier_optimizer=optax.adam(rate), **arguments)


def schedule(name, problem, rate=3e-3, kept=(), **arguments):
    levels = dict.fromkeys(("a", "b"), cbp_jax.get_constraint(name).levels)
    arguments["ascent"] = reference.Adam(rate)
    return reference.Schedule(levels, scales(problem.params, kept), problem.params, **arguments)


@pytest.mark.parametrize(("seed", "name"), list(enumerate(NAMES)))
def test_schedule(seed, name):
    problem, when = Regression(seed), {"steps_per_epoch": 3, "patience": 4}
    reference = schedule(name, problem, **when)
    compare(link(name, **when), reference, problem, steps=120)
    # The comparison is worth something only if both reasons to grow have occurred.
    assert reference.updates_of_multipliers > 120 / 3 / 4 + 1
    assert reference.window > 10


@pytest.mark.parametrize(("steps_per_epoch", "patience"), [(1, 1), (1, 3), (5, 1), (4, 1000)])
def test_schedule_at_its_limits(steps_per_epoch, patience):
    problem, when = Regression(2), {"steps_per_epoch": steps_per_epoch, "patience": patience}
    reference = schedule("ternary", problem, **when)
    # A loss that rises and falls for reasons of its own.
    compare(link("ternary", **when), reference, problem, steps=60, offset=math.sin)
    assert reference.updates_of_multipliers > 2


def test_patience_of_one_grows_at_every_epoch():
    problem, when = Regression(0), {"steps_per_epoch": 2, "patience": 1}
    state = compare(link("binary", **when), schedule("binary", problem, **when), problem, 26)
    # The window grew at the end of twelve epochs: nine times by 1 to 10, then three times by 10.
    assert state.window == 40


AXES = [
    (-1, (1, 1, 4)),
    (0, (2, 1, 1)),
    ((0, -1), (2, 1, 4)),
    ((-1, 0), (2, 1, 4)),
    ((0, 0), (2, 1, 1)),
]


@pytest.mark.parametrize(("axes", "shape"), AXES)
def test_schedule_with_a_scale_per_channel(axes, shape):
    problem, when = Regression(3), {"steps_per_epoch": 3, "patience": 3}

    def kept(w):
        return [axis % w.ndim for axis in (axes if isinstance(axes, tuple) else (axes,))]

    reference = schedule("one_bit_shift", problem, kept=kept, **when)
    state = compare(link("one_bit_shift", scale_axis=axes, **when), reference, problem, 40)
    assert state.weight_scale["b"].shape == shape


@pytest.mark.parametrize("initial_window", [1, math.inf])
@pytest.mark.parametrize(
    "growth",
    [None, lambda g: 1.5 * g, lambda g: math.inf],
    ids=["default", "by half", "to infinity"],
)
def test_schedule_of_the_window(initial_window, growth):
    problem, when = Regression(4), {"steps_per_epoch": 3, "patience": 2}
    when["initial_window"] = initial_window
    grow = None if growth is None else lambda g: growth(g) + jnp.zeros(())
    reference = schedule("two_bit_shift", problem, growth=growth, **when)
    compare(link("two_bit_shift", window_growth=grow, **when), reference, problem, 30)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "at", [{0, 7}, {7, 8, 16, 33}, set(range(40))], ids=["0 7", "7 8 16 33", "all"]
)
def test_an_epoch_with_a_bad_value_is_not_compared(bad, at):
    problem, when = Regression(5), {"steps_per_epoch": 4, "patience": 6}
    reference = schedule("ternary", problem, **when)

    def offset(step):
        return bad if step in at else math.sin(step)

    compare(link("ternary", **when), reference, problem, 40, offset)
    assert reference.skipped == len(at)
    assert all(np.all(np.isfinite(m)) for m in reference.multipliers.values())


def test_a_bad_value_skips_two_comparisons_and_no_more():
    """By hand: the Lagrangian rises in every epoch, so the window grows at each comparison."""
    windows = windows_of([1.0, 2.0, 3.0, 4.0, 5.0, jnp.nan, 7.0, 8.0, 9.0, 10.0, 11.0])
    # Growth forgets the previous epoch, so every second comparison finds a rise; the nan delays the
    # next by its own epoch and one.
    assert windows == [1, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5]


def test_an_equal_lagrangian_has_not_fallen():
    assert windows_of([3.0, 3.0, 3.0, 2.5, 2.0, 2.0, 0.0]) == [1, 1, 2, 2, 2, 2, 3]


def windows_of(values):
    """The window after each of these losses, which are the Lagrangians of epochs of one step."""
    params = {"w": jnp.array([[1.0, -1.0]])}
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=1, patience=100)
    state, windows, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for value in values:
        _, state = update(params, state, params, value=value)
        windows.append(float(state.window))
    return windows


def test_a_problem_solved_by_hand():
    """Minimizes sum c/2 (w - t)^2 on binary levels ±1: each weight ends at the level nearest to t.

    There the loss pulls a weight off its level with c |level - t|, and the constraint holds it with
    2 multiplier, so at the end multiplier >= c |level - t| / 2. A weight whose t and start are on
    a level violates nothing: its multiplier stays 0.
    """
    target = jnp.array([[0.5, -0.75, 0.25, 1.25, 1.0, -1.0]])
    curvature = jnp.array([[1.0, 2.0, 1.0, 0.5, 3.0, 1.0]])
    start = {"w": jnp.array([[0.5, -1.5, -0.5, 1.5, 1.0, -1.0]])}
    rate, when = 0.01, {"steps_per_epoch": 10, "patience": 1}
    link = cbp_jax.cbp("binary", multiplier_optimizer=optax.adam(2e-2), **when)
    optimizer = optax.chain(link, optax.sgd(rate))

    def loss_fn(params):
        return jnp.sum(curvature / 2 * (params["w"] - target) ** 2)

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state))
            updates, state = optimizer.update(grads, state, params, value=loss)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=4000)[0]

    params, state = run(start, optimizer.init(start))
    scale, multipliers = state[0].weight_scale["w"], np.asarray(state[0].multipliers["w"])
    assert scale == 1  # mean |start|
    levels = np.array([[1, -1, 1, 1, 1, -1]])
    np.testing.assert_array_equal(cbp_jax.quantize(params, state)["w"], levels)
    # A weight crosses its level by at most a step.
    reach = rate * (curvature * np.abs(levels - target) + 2 * multipliers)
    assert np.all(np.abs(params["w"] - levels) <= reach + 1e-6)
    pull = np.asarray(curvature * np.abs(levels - target))
    assert np.all(2 * multipliers[:, :4] >= pull[:, :4])
    np.testing.assert_array_equal(multipliers[:, 4:], 0)
    np.testing.assert_array_equal(params["w"][:, 4:], levels[:, 4:])


def test_first_step_by_hand():
    """Adam's first step is its rate where there is a gradient: at window 1, outside the levels."""
    params = {"w": jnp.array([[-2.0, -1.0, 0.25, 0.75]])}  # of mean absolute value 1
    optimizer = cbp_jax.cbp("ternary", multiplier_optimizer=optax.adam(0.5))
    gradient = {"w": jnp.full((1, 4), 10.0)}
    updates, state = optimizer.update(gradient, optimizer.init(params), params, value=3.0)
    np.testing.assert_allclose(state.multipliers["w"], [[0.5, 0, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(updates["w"], [[10 - 0.5 * 2, 10, 10, 10]], rtol=1e-5)
    assert state.lagrangian_sum == pytest.approx(3 + 0.5 * 2, rel=1e-5)
    assert (state.count, state.step_in_epoch, state.started, state.skipped_values) == (
        1,
        1,
        True,
        0,
    )


def test_default_multiplier_optimizer_is_adam_at_1e_4():
    params = {"w": jnp.array([[-2.0, -1.0, 0.25, 0.75]])}
    optimizer = cbp_jax.cbp("ternary")
    _, state = optimizer.update(params, optimizer.init(params), params, value=0.0)
    np.testing.assert_allclose(state.multipliers["w"], [[1e-4, 0, 0, 0]], rtol=1e-5)


def test_multiplier_learning_rate_is_that_of_adam():
    problem, when = Regression(4), {"steps_per_epoch": 1, "patience": 2}
    link = cbp_jax.cbp("ternary", multiplier_learning_rate=7e-3, mask=MASK, **when)
    compare(link, schedule("ternary", problem, rate=7e-3, **when), problem, 12)


def test_another_multiplier_optimizer():
    problem, when = Regression(6), {"steps_per_epoch": 2, "patience": 2}
    expected = schedule("binary", problem, **when)
    expected.ascent = reference.Descent(0.03)
    optimizer = cbp_jax.cbp("binary", multiplier_optimizer=optax.sgd(0.03), mask=MASK, **when)
    compare(optimizer, expected, problem, 40)


def test_a_mapping_gives_each_leaf_its_constraint():
    problem, when = Regression(7), {"steps_per_epoch": 2, "patience": 3}
    reference = schedule("binary", problem, **when)
    reference.levels = {"a": cbp_jax.two_bit_shift().levels, "b": (-1.0, 1.0)}
    constraints = {"free": None, "a": cbp_jax.two_bit_shift(), ".*": "binary"}
    optimizer = cbp_jax.cbp(constraints, multiplier_learning_rate=3e-3, mask=True, **when)
    compare(optimizer, reference, problem, 40)


def test_scale_fn():
    seen = []

    def largest(w, kept_axes):
        seen.append((w.dtype, kept_axes))
        axes = tuple(i for i in range(w.ndim) if i not in kept_axes)
        return jnp.max(jnp.abs(w), axis=axes, keepdims=bool(kept_axes))

    w = jnp.array([[1.0, -3.0], [2.0, 0.5]], jnp.bfloat16)
    assert cbp_jax.cbp("binary", scale_fn=largest).init({"w": w}).weight_scale["w"] == 3
    scale = cbp_jax.cbp("binary", scale_fn=largest, scale_axis=-1).init({"w": w}).weight_scale["w"]
    np.testing.assert_array_equal(scale, [[2, 3]])
    assert seen == [(jnp.float32, ()), (jnp.float32, (1,))]
    with pytest.raises(ValueError, match=r"scale_fn gave 'w' a scale of shape \(2,\)"):
        cbp_jax.cbp("binary", scale_fn=lambda w, _: jnp.ones(2)).init({"w": w})


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype("float32")])
def test_multiplier_dtype(dtype):
    params = {"w": jnp.array([[-2.0, -1.0, 0.25, 0.75]])}
    optimizer = cbp_jax.cbp("ternary", multiplier_dtype=dtype, steps_per_epoch=1, patience=1)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(params, state, params, value=0.0)
    adam = state.multiplier_opt_state[0]
    assert state.multipliers["w"].dtype == adam.mu["w"].dtype == adam.nu["w"].dtype == dtype
    assert updates["w"].dtype == jnp.float32
    np.testing.assert_allclose(np.float64(state.multipliers["w"])[0, 0], 3e-4, rtol=2e-2)


def test_step_in_epoch_wraps_and_count_saturates():
    params = {"w": jnp.array([[1.0, -1.0]])}
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=3, patience=1)
    state = optimizer.init(params)
    highest = jnp.iinfo(jnp.int32).max
    state = state._replace(count=jnp.array(highest - 2), skipped_values=jnp.array(highest - 1))
    seen, update = [], jax.jit(optimizer.update)
    for _ in range(7):
        _, state = update(params, state, params)
        seen.append((int(state.count), int(state.step_in_epoch), float(state.window)))
    assert [step for _, step, _ in seen] == [1, 2, 0, 1, 2, 0, 1]
    assert [window for *_, window in seen] == [1, 1, 1, 2, 2, 2, 3]
    assert [count for count, *_ in seen] == [highest - 1] + [highest] * 6
    assert state.skipped_values == highest


def test_other_extra_arguments_are_ignored():
    params = {"w": jnp.array([[1.0, -2.0]])}
    optimizer = cbp_jax.cbp("binary")
    state = optimizer.init(params)
    ours = optimizer.update(params, state, params, value=1.0, epoch=3, value_fn=None)
    expected = optimizer.update(params, state, params, value=1.0)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_the_state_starts_as_documented():
    params = {"w": jnp.array([[1.0, -2.0]]), "b": jnp.ones(2)}
    state = cbp_jax.cbp("binary", initial_window=2).init(params)
    assert state._fields == (
        *("count", "step_in_epoch", "started", "constraints", "multipliers", "weight_scale"),
        *("window", "multiplier_opt_state", "lagrangian_sum", "lagrangian_lost"),
        *("previous_sum", "patience_used", "skipped_values", "multiplier_updates"),
    )
    assert state.constraints == {"w": cbp_jax.binary(), "b": optax.MaskedNode()}
    np.testing.assert_array_equal(state.multipliers["w"], [[0, 0]])
    assert (state.weight_scale["w"], state.window) == (1.5, 2)


def sum_of(values):
    """The Lagrangian's sum of an epoch of these losses, under `jit`; multipliers are 0."""
    params = {"w": jnp.array([[1.0, -2.0]])}
    link = cbp_jax.cbp("binary", steps_per_epoch=len(values) + 1, multiplier_learning_rate=0.0)

    def step(state, value):
        return link.update(params, state, params, value=value)[1], None

    state = jax.jit(lambda state, values: jax.lax.scan(step, state, values)[0])
    return float(state(link.init(params), values).lagrangian_sum)


@pytest.mark.parametrize("steps", [1_000, 100_000])
def test_the_sum_of_an_epoch_is_that_of_exact_arithmetic(steps):
    """To two units in the last place; `benchmarks.summation` shows float32 alone."""
    values = (2.3 + 0.1 * np.random.default_rng(0).normal(size=steps)).astype(np.float32)
    exact = math.fsum(map(float, values))
    assert sum_of(values) == pytest.approx(exact, rel=2 * float(np.finfo(np.float32).eps))


def test_the_sum_of_losses_that_are_not_finite_is_minus_infinity():
    assert sum_of(np.array([1, np.nan, 2, np.inf, 3], np.float32)) == -math.inf
