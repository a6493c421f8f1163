"""One network under every kind of parameter tree."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

rng = np.random.default_rng(0)
# Shapes that differ, and so tell the leaves apart whatever a tree calls them.
SHAPES = {"hidden": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "bias": (2,)}}
INITIAL = jax.tree.map(
    lambda shape: np.float32(rng.normal(size=shape)),
    SHAPES,
    is_leaf=lambda node: isinstance(node, tuple),
)
X, Y = np.float32(rng.normal(size=(8, 3))), np.float32(rng.normal(size=(8, 2)))


class Network(NamedTuple):
    params: Any
    forward: Callable


def nested_dict(w):
    def forward(p, x):
        x = jnp.tanh(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])
        return x @ p["head"]["kernel"] + p["head"]["bias"]

    return Network(w, forward)


def tuples(w):
    def forward(p, x):
        (hidden, hidden_bias), (head, head_bias) = p
        return jnp.tanh(x @ hidden + hidden_bias) @ head + head_bias

    layers = (w["hidden"], w["head"])
    return Network(tuple((layer["kernel"], layer["bias"]) for layer in layers), forward)


class LinenNetwork(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(jnp.tanh(nn.Dense(4, name="hidden")(x)))


def linen(w):
    return Network({"params": w}, LinenNetwork().apply)


class NNXNetwork(nnx.Module):
    def __init__(self, w):
        self.hidden = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
        nnx.update(self, w)

    def __call__(self, x):
        return self.head(jnp.tanh(self.hidden(x)))


def nnx_state(w):
    graph, params = nnx.split(NNXNetwork(w), nnx.Param)  # with its variables
    return Network(params, lambda p, x: nnx.merge(graph, p)(x))


class EquinoxLayer(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    activation: Callable

    def __call__(self, x):
        return self.activation(x @ self.kernel + self.bias)


def equinox(w):
    hidden = EquinoxLayer(**w["hidden"], activation=jnp.tanh)
    head = EquinoxLayer(**w["head"], activation=lambda x: x)
    module = eqx.nn.Sequential([eqx.nn.Lambda(hidden), eqx.nn.Lambda(head)])
    params, static = eqx.partition(module, eqx.is_inexact_array)
    return Network(params, lambda p, x: eqx.combine(p, static)(x))


KINDS = [nested_dict, tuples, linen, nnx_state, equinox]


def network(kind, dtype=jnp.float32):
    # New arrays, since the steps donate them.
    return kind(jax.tree.map(lambda w: jnp.array(w, dtype), INITIAL))
