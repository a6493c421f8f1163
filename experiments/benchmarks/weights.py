"""Trees of weights to time the optimizer on."""

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
    """Returns the shapes of ResNet-50's 25.6 million parameters in 161 tensors, and the mask."""
    model = nnx.eval_shape(lambda: models.create("resnet50", rngs=nnx.Rngs(0)))
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), models.split_model(model)[1]
    )
    return shapes, cbp_jax.select(include=model.constrained)


def dense(count: int) -> PyTree:
    """Returns the shapes of square float32 matrices, and a remainder, with `count` weights."""
    side = 2048
    whole, rest = divmod(count, side * side)
    shapes = {f"layer{i}": jax.ShapeDtypeStruct((side, side), jnp.float32) for i in range(whole)}
    if rest >= side:
        shapes["rest"] = jax.ShapeDtypeStruct((rest // side, side), jnp.float32)
    return shapes


def random(shapes: PyTree, seed: int) -> PyTree:
    """Draws normal arrays of these shapes, as large as weights typically are."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(0.05 * rng.standard_normal(leaf.shape, np.float32), leaf.dtype)

    return jax.tree.map(draw, shapes)
