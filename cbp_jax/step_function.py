"""Step functions of the weights: a value for each interval between levels.

There are three ways, which agree to the last bit where the scale is positive: a chain of compares
and selects, which compilers vectorise, for few steps; a division, corrected by comparing with the
edges, for evenly spaced edges and values such as those of `uniform(8)`; and otherwise a bisection,
whose look-ups do not vectorise on a CPU.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

_LONGEST_CHAIN = 16


def step_function(
    w: jax.Array,
    scale: jax.Array,
    edges: Sequence[float],
    values: Sequence[float],
    dtype: DTypeLike,
) -> jax.Array:
    """Returns `values[i]` where `edges[i - 1] * scale <= w < edges[i] * scale`.

    Weights below all edges get the first value, weights above all edges the last.

    Args:
      w: weights, floating; NaN gets the first value.
      scale: the unit of the edges, broadcastable to `w`.
      edges: strictly increasing.
      values: one more than edges.
      dtype: dtype of the result.

    Returns:
      Array of the shape of `w`, or of shape () if all values are equal.
    """
    if len(set(values)) == 1:  # such as the gap of evenly spaced levels
        return jnp.asarray(values[0], dtype)
    if len(values) <= _LONGEST_CHAIN:
        result = jnp.asarray(values[0], dtype)
        for edge, value in zip(edges, values[1:], strict=True):
            result = jnp.where(w >= edge * scale, jnp.asarray(value, dtype), result)
        return result
    if _is_exact_progression(edges) and _is_exact_progression(values):
        index = _divide(w, scale, edges)
        return (values[0] + index * (values[1] - values[0])).astype(dtype)
    return _bisect(w, scale, edges, values, dtype)


def _is_exact_progression(numbers: Sequence[float]) -> bool:
    """Whether float32 computes every number as `first + i * step` without rounding."""
    exact = np.asarray(numbers, np.float64)
    multiples = np.arange(len(exact)) * (exact[1] - exact[0])
    in_float32 = all(
        np.all(np.float32(part) == part) for part in (exact, multiples, exact[1] - exact[0])
    )
    return in_float32 and bool(np.all(exact[0] + multiples == exact))


def _divide(w: jax.Array, scale: jax.Array, edges: Sequence[float]) -> jax.Array:
    """The number of edges at or below each weight, floating."""
    first, step, count = edges[0], edges[1] - edges[0], len(edges)
    # Rounding may put it off by one.
    index = jnp.floor((w / jnp.where(scale > 0, scale, 1) - first) / step) + 1
    index = jnp.clip(jnp.where(jnp.isnan(index), 0, index), 0, count)
    index -= (index > 0) & ~(w >= (first + (index - 1) * step) * scale)
    return index + ((index < count) & (w >= (first + index * step) * scale))


def _bisect(
    w: jax.Array,
    scale: jax.Array,
    edges: Sequence[float],
    values: Sequence[float],
    dtype: DTypeLike,
) -> jax.Array:
    table, step = jnp.asarray(edges, w.dtype), 1 << (len(edges).bit_length() - 1)
    index = jnp.where(w >= edges[step - 1] * scale, step, 0)
    while step := step // 2:
        above = w >= _look_up(table, jnp.minimum(index + step, len(edges)) - 1, w) * scale
        index = jnp.where(above & (index + step <= len(edges)), index + step, index)
    return _look_up(jnp.asarray(values, dtype), index, w)


def _look_up(table: jax.Array, index: jax.Array, w: jax.Array) -> jax.Array:
    """Returns `table[index]`, sharded like `w`: a gather needs that in explicit sharding mode."""
    sharding = jax.typeof(w).sharding
    explicit = jax.sharding.AxisType.Explicit in sharding.mesh.axis_types
    return table.at[index].get(out_sharding=sharding if explicit else None)
