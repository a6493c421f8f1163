"""Errors of `cbp`, which say what was wrong, what was expected and what to do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax

W = {"layer": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.ones(2)}}


NUMBERS = [0, -1, 2.5, math.nan, math.inf, "10", np.int64(0), np.float32(0.5)]


@pytest.mark.parametrize("name", ["steps_per_epoch", "patience"])
@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_counts(name, number):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
        cbp_jax.cbp("binary", **{name: number})


@pytest.mark.parametrize("name", ["steps_per_epoch", "patience"])
def test_counts_beyond_int32(name):
    """These mean never; JAX cannot compare such a number with a counter."""
    optimizer = cbp_jax.cbp("binary", **{"steps_per_epoch": 1, "patience": 10, name: 2**40})
    state, update = optimizer.init(W), jax.jit(optimizer.update)
    for step in range(12):
        _, state = update(W, state, W, value=-float(step))
    assert (state.window, state.patience_used) == (1, 11 if name == "patience" else 0)


@pytest.mark.parametrize("window", [0.5, 0, -1.0, math.nan])
def test_wrong_initial_window(window):
    with pytest.raises(ValueError, match="initial_window must be a number of at least 1"):
        cbp_jax.cbp("binary", initial_window=window)


@pytest.mark.parametrize("axis", [0.5, "0", (0, None), True])
def test_scale_axis_of_a_wrong_type(axis):
    with pytest.raises(ValueError, match="scale_axis must be an integer"):
        cbp_jax.cbp("binary", scale_axis=axis)


@pytest.mark.parametrize("axis", [2, -3, (0, 5)])
def test_scale_axis_that_does_not_exist(axis):
    message = r"scale_axis .* does not exist in 'layer/kernel', which has 2 axes"
    with pytest.raises(ValueError, match=message):
        cbp_jax.cbp("binary", scale_axis=axis).init(W)


def test_wrong_multiplier_dtype():
    with pytest.raises(ValueError, match="multiplier_dtype must be a floating dtype"):
        cbp_jax.cbp("binary", multiplier_dtype=jnp.int32)


def test_a_pattern_that_matches_nothing():
    masked = cbp_jax.cbp("binary", mask=cbp_jax.select("layer/kernle"))
    for link in (masked, cbp_jax.cbp({"layer/kernle": "binary"})):
        with pytest.raises(ValueError, match=r"'layer/kernle' matches none.*misses: layer/kernel"):
            link.init(W)


def test_update_without_parameters():
    optimizer = cbp_jax.cbp("binary")
    with pytest.raises(ValueError, match="needs the parameters"):
        optimizer.update(W, optimizer.init(W))


@pytest.mark.parametrize(
    "leaf", [jnp.ones((2, 2), jnp.int8), jnp.ones((2, 2), bool), jnp.ones((2, 2), jnp.complex64)]
)
def test_a_leaf_that_is_not_floating(leaf):
    with pytest.raises(TypeError, match=f"'codes' cannot be constrained: it is {leaf.dtype}"):
        cbp_jax.cbp("binary", mask=True).init({"codes": leaf})


def test_an_all_zero_layer():
    params = {"fine": jnp.ones((2, 2)), "fresh": {"kernel": jnp.zeros((2, 2))}}
    optimizer = cbp_jax.cbp("binary", steps_per_epoch=1, patience=1)
    with pytest.raises(ValueError, match=r"'fresh/kernel' is 0.*pre-trained"):
        optimizer.init(params)
    # Under jit the values are unknown, and the leaf is left alone.
    state = jax.jit(optimizer.init)(params)
    assert state.weight_scale["fresh"]["kernel"] == 0
    params = {"fine": 2 * jnp.ones((2, 2)), "fresh": {"kernel": jnp.ones((2, 2))}}
    update = jax.jit(optimizer.update)
    for _ in range(3):
        updates, state = update(params, state, params, value=1.0)
    np.testing.assert_array_equal(updates["fresh"]["kernel"], 1)
    np.testing.assert_array_equal(state.multipliers["fresh"]["kernel"], 0)
    assert np.all(state.multipliers["fine"] > 0)


def test_weights_that_are_not_finite():
    with pytest.raises(ValueError, match="'layer/kernel' is negative or not finite"):
        cbp_jax.cbp("binary").init({"layer": {"kernel": jnp.array([[1.0, jnp.nan]])}})


def test_parameters_other_than_the_states():
    optimizer = cbp_jax.cbp("binary")
    state = optimizer.init(W)
    kernel, bias = W["layer"]["kernel"], W["layer"]["bias"]
    renamed, short = {"weight": kernel, "bias": bias}, {"kernel": kernel.T[:1], "bias": bias}
    for other, says in [
        ({"layer": renamed}, r"parameters lack 1 of the 1 .*layer/kernel.*They have"),
        ({"layer": {"bias": bias}}, "parameters lack .*layer/kernel"),
        ({"layer": short}, r"'layer/kernel' has shape \(1, 2\).*made for \(2, 2\)"),
        ({**W, "more": kernel}, "does not know more"),
    ]:
        with pytest.raises(ValueError, match=says):
            optimizer.update(other, state, other, value=1.0)


def test_updates_without_a_constrained_leaf():
    optimizer = cbp_jax.cbp("binary")
    with pytest.raises(ValueError, match="updates lack 'layer/kernel'"):
        optimizer.update({"layer": {"bias": jnp.ones(2)}}, optimizer.init(W), W, value=1.0)


@pytest.mark.parametrize("value", [jnp.ones(1), np.ones((2, 2))])
def test_value_that_is_not_a_scalar(value):
    optimizer = cbp_jax.cbp("binary")
    with pytest.raises(ValueError, match="value must be the loss, a scalar"):
        optimizer.update(W, optimizer.init(W), W, value=value)
