"""Warnings of steps without a loss, and of weights quantized before they are measured."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from pages import block

import cbp_jax

X = np.float32(np.random.default_rng(0).normal(size=(8, 4)))
WEIGHTS = jax.random.normal(jax.random.key(0), (32, 16))


def readme_train_state():
    namespace = {"train_state": train_state, "optax": optax}
    exec(block("linen"), namespace)
    return namespace["TrainState"]


TrainState = readme_train_state()


def linen_run(kind, steps, **arguments):
    model = nn.Dense(3)
    state = kind.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), X)["params"],
        tx=optax.chain(cbp_jax.cbp("ternary", steps_per_epoch=2, **arguments), optax.sgd(0.1)),
    )

    def loss_fn(params):
        return jnp.mean(model.apply({"params": params}, X) ** 2)

    @jax.jit
    def step(state):
        quantized = cbp_jax.quantize(state.params, state.opt_state)
        loss, grads = jax.value_and_grad(loss_fn)(quantized)
        return state.apply_gradients(grads=grads, **({"value": loss} if kind is TrainState else {}))

    for _ in range(steps):
        state = step(state)
    return state


def test_flax_train_state_drops_the_value():
    with pytest.warns(UserWarning, match=r"got no value.*value=loss.*apply_gradients") as caught:
        state = linen_run(train_state.TrainState, 4)
    # Once, while it is compiled, rather than at every step.
    assert len([entry for entry in caught if "got no value" in str(entry.message)]) == 1
    report = str(cbp_jax.layer_report(state.params, state.opt_state))
    assert "4 of 4 steps had no finite value" in report


def test_a_train_state_that_passes_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = linen_run(TrainState, 4)
    assert state.opt_state[0].skipped_values == 0
    assert state.step == 4


def test_with_a_patience_of_one_nothing_is_compared():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = linen_run(train_state.TrainState, 4, patience=1)
    assert cbp_jax.window(state.opt_state) == 2


@pytest.mark.parametrize("constraint", ["binary", "ternary", "two_bit_shift"])
@pytest.mark.parametrize("axis", [None, -1])
def test_init_on_quantized_weights(constraint, axis):
    params = {"layer": {"kernel": WEIGHTS}}
    link = cbp_jax.cbp(constraint, scale_axis=axis)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = link.init(params)
        jax.jit(link.init)(cbp_jax.quantize(params, state))  # whose values are unknown
    message = (
        r"'layer/kernel' has \d distinct values for the \d levels.*Restore the optimizer state"
    )
    with pytest.warns(UserWarning, match=message):
        link.init(cbp_jax.quantize(params, state))


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param(jnp.where(jnp.abs(WEIGHTS) > 2, WEIGHTS, 0), id="pruned"),
        pytest.param(jnp.zeros((64, 64)).at[-1, :].set(jnp.arange(64.0)), id="zero at the start"),
        pytest.param(jnp.ones((64, 64)), id="constant"),
        pytest.param(jnp.array([[0.5, -0.5, 0.5]]), id="few"),
        pytest.param(WEIGHTS.astype(jnp.bfloat16), id="bfloat16"),
    ],
)
def test_weights_that_are_not_quantized(weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cbp_jax.cbp("ternary").init({"kernel": weights})


def test_quantized_weights_get_another_scale():
    """The scale measured on ternary weights is not their own, so the network changes."""
    params = {"kernel": WEIGHTS}
    link = cbp_jax.cbp("ternary")
    state = link.init(params)
    quantized = cbp_jax.quantize(params, state)
    with pytest.warns(UserWarning, match="distinct values"):
        again = link.init(quantized)
    assert again.weight_scale["kernel"] < 0.9 * state.weight_scale["kernel"]
