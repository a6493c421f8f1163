"""A Flax NNX module with batch norm and dropout, trained as an NNX user would write it."""

import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import cbp_jax

rng = np.random.default_rng(0)
IMAGES, LABELS = np.float32(rng.normal(size=(32, 6))), rng.integers(0, 3, 32)
STEPS = 12


class Network(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.middle = nnx.Linear(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.middle(nnx.relu(self.norm(self.first(x))))
        return self.head(self.dropout(nnx.relu(x)))


def make():
    model = Network(nnx.Rngs(0))
    mask = cbp_jax.select(include="middle/kernel")
    link = cbp_jax.cbp("ternary", steps_per_epoch=3, patience=1, mask=mask)
    return model, nnx.Optimizer(model, optax.chain(link, optax.sgd(1e-2)), wrt=nnx.Param)


def loss_fn(model, images, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def step_with_module(model, optimizer):
    quantized = cbp_jax.quantize(model, optimizer.opt_state)
    loss, grads = nnx.value_and_grad(loss_fn)(quantized, IMAGES, LABELS)
    optimizer.update(model, grads, value=loss)


def step_by_hand(model, optimizer):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    merged = nnx.merge(graphdef, cbp_jax.quantize(params, optimizer.opt_state), rest, copy=True)
    loss, grads = nnx.value_and_grad(loss_fn)(merged, IMAGES, LABELS)
    nnx.update(model, nnx.state(merged, nnx.Not(nnx.Param)))
    optimizer.update(model, grads, value=loss)


def train(step, wrap):
    model, optimizer = make()
    step = wrap(step)
    for _ in range(STEPS):
        step(model, optimizer)
    return nnx.state(model, nnx.Not(nnx.RngKey)), optimizer


@pytest.fixture(scope="module")
def trained_by_hand():
    return train(step_by_hand, nnx.jit)


@pytest.mark.parametrize("wrap", [nnx.jit, lambda step: step], ids=["nnx.jit", "eager"])
def test_module_equals_splitting_and_merging_by_hand(wrap, trained_by_hand):
    state, optimizer = train(step_with_module, wrap)
    expected, expected_optimizer = trained_by_hand
    assert state["dropout"]["rngs"]["count"][...] == STEPS
    assert float(jnp.max(jnp.abs(state["norm"]["mean"][...]))) > 0.01
    trees = nnx.to_pure_dict(state), nnx.to_pure_dict(expected)
    chex.assert_trees_all_close(*trees, rtol=1e-5, atol=1e-6)
    assert cbp_jax.window(optimizer.opt_state) == cbp_jax.window(expected_optimizer.opt_state) == 4


def test_everything_but_the_constrained_weights_is_shared():
    model, optimizer = make()
    before = np.array(model.middle.kernel[...])
    quantized = cbp_jax.quantize(model, optimizer.opt_state)
    assert isinstance(quantized, Network)
    assert quantized.norm.mean is model.norm.mean
    assert quantized.dropout.rngs.count is model.dropout.rngs.count
    assert quantized.head.kernel is model.head.kernel
    assert quantized.middle.kernel is not model.middle.kernel
    np.testing.assert_array_equal(model.middle.kernel[...], before)
    assert len(np.unique(quantized.middle.kernel[...])) == 3


def test_tied_weights_stay_tied():
    model, _ = make()
    model.tied = model.middle
    link = cbp_jax.cbp("binary", mask=cbp_jax.select(include="middle/kernel"))
    optimizer = nnx.Optimizer(model, link, wrt=nnx.Param)
    quantized = cbp_jax.quantize(model, optimizer.opt_state)
    assert quantized.tied is quantized.middle
    assert len(np.unique(quantized.tied.kernel[...])) == 2


def test_modules_inside_a_tree():
    model, _ = make()
    params = {"a": model, "b": jnp.ones((2, 2))}
    state = cbp_jax.cbp("binary", mask=cbp_jax.select(include="a/middle/kernel")).init(params)
    quantized = cbp_jax.quantize(params, state)
    assert quantized["a"].norm.mean is model.norm.mean
    assert len(np.unique(quantized["a"].middle.kernel[...])) == 2
    np.testing.assert_array_equal(quantized["b"], params["b"])


def test_closing_around_an_optimizer():
    model = Network(nnx.Rngs(0))
    mask = cbp_jax.select(include="middle/kernel")
    closing = cbp_jax.closing(optax.adamw(1e-2), "ternary", STEPS, mask=mask)
    optimizer = nnx.Optimizer(model, closing, wrt=nnx.Param)
    before = nnx.state(model, nnx.Param)["head"]["kernel"][...]
    step = nnx.jit(step_with_module)
    for _ in range(STEPS):
        step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    assert float(cbp_jax.constraint_failure_score(params, optimizer.opt_state)) == 0
    assert np.isinf(cbp_jax.window(optimizer.opt_state))
    assert float(jnp.max(jnp.abs(params["head"]["kernel"][...] - before))) > 1e-3
