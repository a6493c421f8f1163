"""An Equinox module, with functions and settings among its leaves: trained, packed and run."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax


class Network(eqx.Module):
    first: eqx.nn.Linear
    middle: eqx.nn.Linear
    dropout: eqx.nn.Dropout  # a number and a bool
    activation: Callable
    head: eqx.nn.Linear

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.first, self.middle = eqx.nn.Linear(4, 8, key=keys[0]), eqx.nn.Linear(8, 8, key=keys[1])
        self.head = eqx.nn.Linear(8, 2, key=keys[2])
        self.dropout, self.activation = eqx.nn.Dropout(0.1, inference=True), jax.nn.relu

    def __call__(self, x):
        x = self.activation(self.first(x))
        return self.head(self.dropout(self.activation(self.middle(x))))


X = jax.random.normal(jax.random.key(1), (16, 4))


@pytest.fixture(scope="module")
def trained():
    model = Network()
    mask = cbp_jax.select(include="middle/weight")
    link = cbp_jax.cbp("ternary", steps_per_epoch=2, patience=1, mask=mask)
    optimizer = optax.chain(link, optax.sgd(0.05))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        loss_fn = eqx.filter_value_and_grad(lambda m: jnp.mean(jax.vmap(m)(X) ** 2))
        loss, grads = loss_fn(cbp_jax.quantize(model, state))
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = optimizer.update(grads, state, params, value=loss)
        return eqx.apply_updates(model, updates), state

    for _ in range(5):
        model, state = step(model, state)
    return model, state


def test_pack_takes_what_quantize_takes(trained, tmp_path):
    model, state = trained
    quantized = cbp_jax.quantize(model, state)
    cbp_jax.save_packed(tmp_path / "weights.safetensors", cbp_jax.pack(model, state, round=True))
    packed = cbp_jax.load_packed(tmp_path / "weights.safetensors")
    unpacked = cbp_jax.unpack(packed, Network())
    assert isinstance(unpacked, Network)
    assert unpacked.activation is jax.nn.relu
    assert unpacked.dropout.p == 0.1
    arrays = (jax.tree.leaves(eqx.filter(tree, eqx.is_array)) for tree in (unpacked, quantized))
    for got, wanted in zip(*arrays, strict=True):
        np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(jax.vmap(unpacked)(X), jax.vmap(quantized)(X))
    assert "activation" not in packed.tensors


@pytest.mark.parametrize("weights", ["expand", "packed"])
def test_predict(trained, weights):
    model, state = trained
    packed = cbp_jax.pack(model, state, round=True)
    forward = lambda model, x: jax.vmap(model)(x)  # noqa: E731
    predict = cbp_jax.make_predict(forward, packed, Network(), weights=weights)
    expected = jax.vmap(cbp_jax.quantize(model, state))(X)
    np.testing.assert_allclose(predict(X), expected, rtol=1e-5, atol=1e-6)


def test_a_missing_array_is_named(trained):
    model, state = trained
    packed = cbp_jax.pack(model, state, round=True)
    with pytest.raises(cbp_jax.PackedError, match="the template has no 'head/bias'"):
        cbp_jax.unpack(packed, eqx.tree_at(lambda m: m.head.bias, Network(), None))
