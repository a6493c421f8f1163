"""Arguments that a program might make up: an error that says what is wrong, or the right thing."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cbp_jax

W = {"layer": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]])}}
NO_NUMBERS = ("1", None, (1,), True, math.nan, 1j, np.ones(2), object())


@pytest.mark.parametrize("number", [n for n in NO_NUMBERS if n is not None])
@pytest.mark.parametrize("name", ["steps_per_epoch", "patience", "initial_window"])
def test_no_numbers_under_cbp(name, number):
    with pytest.raises(ValueError, match=f"{name} must be a "):
        cbp_jax.cbp("binary", **{name: number})


@pytest.mark.parametrize("number", NO_NUMBERS)
@pytest.mark.parametrize("name", ["total_steps", "closes_at", "strength"])
def test_no_numbers_under_closing(name, number):
    with pytest.raises(ValueError, match=f"{name} must be a "):
        cbp_jax.closing(optax.sgd(1.0), "binary", **{"total_steps": 10, name: number})


@pytest.mark.parametrize(
    "number", [0, -1, 2.5, jnp.array(0), jnp.array(-3.0), np.int64(0), math.inf]
)
def test_counts_out_of_range(number):
    with pytest.raises(ValueError, match="patience must be a whole number of at least 1"):
        cbp_jax.cbp("binary", patience=number)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("closes_at", 0), ("closes_at", 1.5), ("closes_at", jnp.array(-0.5)),
        ("strength", -1), ("strength", np.float32(-1)), ("strength", math.inf),
    ],
)  # fmt: skip
def test_numbers_out_of_range(name, number):
    with pytest.raises(ValueError, match=f"{name} must be a"):
        cbp_jax.closing(optax.sgd(1.0), "binary", 10, **{name: number})


@pytest.mark.parametrize("bound", [0, -1.0, np.float64(-2), math.nan, "1"])
@pytest.mark.parametrize("name", ["weight_bound", "gradient_clip"])
def test_bounds_of_the_recipe(name, bound):
    with pytest.raises(ValueError, match=f"{name} must be positive or None"):
        cbp_jax.cbp_sgd(0.1, "binary", **{name: bound})


def test_an_optimizer_that_was_not_called():
    with pytest.raises(
        TypeError, match=r"got a function: call it, multiplier_optimizer=adam\(...\)"
    ):
        cbp_jax.cbp("binary", multiplier_optimizer=optax.adam)
    with pytest.raises(TypeError, match=r"inner must be an optax optimizer, got a function"):
        cbp_jax.closing(optax.adam, "binary", 10)
    cbp_jax.closing(optax.MultiSteps(optax.sgd(0.1), 2), "binary", 10).init(W)
    with pytest.raises(TypeError, match="inner must be an optax optimizer, got dict"):
        cbp_jax.closing({}, "binary", 10)


@pytest.mark.parametrize("rate", [-1e-3, math.nan, "fast"])
def test_rates_of_the_multipliers(rate):
    with pytest.raises(ValueError, match="multiplier_learning_rate must be a number of at least 0"):
        cbp_jax.cbp("binary", multiplier_learning_rate=rate)
    cbp_jax.cbp("binary", multiplier_learning_rate=optax.constant_schedule(1e-3)).init(W)


def test_multipliers_in_float16():
    """Adam's epsilon is 0 there, and so were its moments."""
    with pytest.raises(ValueError, match="float16 cannot hold Adam's moments"):
        cbp_jax.cbp("binary", multiplier_dtype=jnp.float16)
    capped = optax.chain(optax.clip(3e-3), optax.sgd(0.03))
    link = cbp_jax.cbp("binary", multiplier_dtype=jnp.float16, multiplier_optimizer=capped)
    _, state = link.update(W, link.init(W), W, value=1.0)
    assert np.all(np.isfinite(state.multipliers["layer"]["kernel"]))


@pytest.mark.parametrize(
    "growth", [lambda g: g - 1, lambda g: g * jnp.nan, lambda g: -jnp.inf, lambda g: g]
)
def test_a_window_that_would_not_grow_stays(growth):
    link = cbp_jax.cbp(
        "binary", steps_per_epoch=1, patience=1, initial_window=5, window_growth=growth
    )
    state, update = link.init(W), jax.jit(link.update)
    for _ in range(4):
        _, state = update(W, state, W, value=1.0)
    assert state.window == 5
    assert state.multiplier_updates == 4


@pytest.mark.parametrize("levels", [(0.0, 1e-60), (1.0, 1.0 + 1e-12), (-1.0, 1e39)])
def test_levels_that_float32_does_not_tell_apart(levels):
    with pytest.raises(ValueError, match="levels that differ, and are finite, in float32"):
        cbp_jax.Constraint("fine", levels)


def test_complex_weights():
    with pytest.raises(TypeError, match="weights must be real, got complex64"):
        cbp_jax.binary().quantize(jnp.ones(2, jnp.complex64), 1.0)


@given(
    st.one_of(
        st.integers(), st.just(-(10**400)), st.floats(), st.text(max_size=3), st.booleans(),
        st.none(), st.complex_numbers(), st.binary(max_size=2), st.lists(st.integers(), max_size=2),
        st.sampled_from([np.float32(3), np.int8(2), jnp.array(4), jnp.ones(3), jnp.nan]),
    )
)  # fmt: skip
def test_any_value_is_taken_or_refused(value):
    """By a documented error, whatever it is."""
    for name in ("steps_per_epoch", "patience", "initial_window"):
        assert_taken_or_refused(name, lambda n=name: cbp_jax.cbp("binary", **{n: value}))
    for name in ("total_steps", "closes_at", "strength"):
        arguments = {"total_steps": 9, name: value}
        assert_taken_or_refused(
            name, lambda a=arguments: cbp_jax.closing(optax.sgd(1.0), "binary", **a)
        )


def assert_taken_or_refused(name, make):
    messages = []
    try:
        make().init(W)
    except ValueError as error:
        messages.append(str(error))
    assert all(message.startswith(f"{name} must be") for message in messages)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jitted", [False, True])
def test_numbers_that_optax_makes_arrays(dtype, jitted):
    """`inject_hyperparams` gives them the parameters' dtype, and traces them under `jit`."""
    static = (
        *("constraint", "mask", "steps_per_epoch", "patience", "scale_axis", "scale_fn"),
        *("multiplier_optimizer", "window_growth", "multiplier_dtype"),
    )
    params = jax.tree.map(lambda w: w.astype(dtype), W)
    for make, extra in (
        (cbp_jax.cbp, {"multiplier_learning_rate": 1e-3}),
        (cbp_jax.cbp_sgd, {"learning_rate": 0.1, "multiplier_learning_rate": 1e-3}),
    ):
        more = ("decay_mask",) if make is cbp_jax.cbp_sgd else ()
        optimizer = optax.inject_hyperparams(make, static_args=(*static, *more))(
            constraint="binary", steps_per_epoch=2, patience=1, **extra
        )
        state = optimizer.init(params)
        update = jax.jit(optimizer.update) if jitted else optimizer.update
        with jax.checking_leaks():
            updates, state = update(params, state, params, value=1.0)
        assert np.all(np.isfinite(np.float32(updates["layer"]["kernel"])))


def test_an_optimizer_that_has_no_hash():
    """A callable that JAX cannot compare may be the update of an optimizer all the same."""

    @dataclasses.dataclass
    class Ascent:
        rate: float

        def __call__(self, updates, state, params=None, **extra):
            return jax.tree.map(lambda g: -self.rate * g, updates), state

    ascent = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), Ascent(1e-3))
    link = cbp_jax.cbp("binary", multiplier_optimizer=ascent)
    _, state = jax.jit(link.update)(W, link.init(W), W, value=1.0)
    assert float(jnp.max(state.multipliers["layer"]["kernel"])) > 0
