"""The trees of weights that the optimizer is timed on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import models
from flax import nnx

import cbp_jax

PyTree = Any


def resnet50() -> tuple[PyTree, Callable[[PyTree], PyTree]]:
    """Shapes of the parameters of ResNet-50, 25.6 million in 161 tensors, and which of them are constrained."""
    model = nnx.eval_shape(lambda: models.create("resnet50", rngs=nnx.Rngs(0)))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), models.split_model(model)[1]
    )
    return shapes, cbp_jax.select(include=model.constrained)


def dense(count: int) -> PyTree:
    """Shapes of square matrices, and a rest, of so many float32 weights."""
    side = 2048
    whole, rest = divmod(count, side * side)
    shapes = {f"layer{i}": jax.ShapeDtypeStruct((side, side), jnp.float32) for i in range(whole)}
    return shapes | (
        {"rest": jax.ShapeDtypeStruct((rest // side, side), jnp.float32)} if rest >= side else {}
    )


def random(shapes: PyTree, seed: int) -> PyTree:
    """Arrays of these shapes; normal, of the size that weights have."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype),
        shapes,
    )
