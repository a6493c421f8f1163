"""Proximal maps that pull weights towards the levels, and how strongly as training goes on.

PARQ and BinaryRelax both begin with the weights as they are and end with quantized ones; the maps
between are pure functions of weights, levels and one number that is annealed.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

import cbp_jax


def parq(
    w: ArrayLike, constraint: cbp_jax.Constraint, scale: ArrayLike, inverse_slope: ArrayLike
) -> jax.Array:
    """Returns the proximal map of a convex regularizer that is affine between its kinks.

    With the levels `q_0 < q_1 < ...` times the scale, midpoints `m_k` and an inverse slope `r`, the
    map climbs from each level to the next on a ramp around their midpoint:

        q_0 + sum_k clip((w - m_k) / r + (q_k+1 - q_k) / 2, 0, q_k+1 - q_k)

    At `r = 1` that is the weight itself between the outermost levels; at `r = 0` it is the nearest
    level. Outside it is the outermost level.

    Args:
      w: latent weights, floating, any shape.
      constraint: has the levels.
      scale: their unit, shape () or broadcastable to `w`.
      inverse_slope: of the ramps, from 1 down to 0, shape ().

    Returns:
      Array of the shape and dtype of `w`.

    Reference: Jin et al., "PARQ: piecewise-affine regularized quantization", ICML 2025,
      arXiv 2503.15748.
    """
    w = jnp.asarray(w)
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    latent, scale, r = (jnp.asarray(x, dtype) for x in (w, scale, inverse_slope))
    slope = 1 / jnp.maximum(r, jnp.finfo(dtype).tiny)
    on_ramps = constraint.levels[0] * scale
    for low, high in itertools.pairwise(constraint.levels):
        gap, middle = (high - low) * scale, (low + high) / 2 * scale
        on_ramps += jnp.clip((latent - middle) * slope + gap / 2, 0, gap)
    return jnp.where(r > 0, on_ramps.astype(w.dtype), constraint.quantize(w, scale))


def binary_relax(
    w: ArrayLike, constraint: cbp_jax.Constraint, scale: ArrayLike, theta: ArrayLike
) -> jax.Array:
    """Returns weights on their way to the nearest level: `(1 - theta) w + theta q(w)`.

    Args:
      w: latent weights, floating, any shape.
      constraint: has the levels.
      scale: their unit, shape () or broadcastable to `w`.
      theta: from 0 up to 1, shape ().

    Returns:
      Array of the shape and dtype of `w`.

    Reference: Yin et al., "BinaryRelax: a relaxation approach for training deep neural networks
      with quantized weights", SIAM Journal on Imaging Sciences, 2018.
    """
    w, share = jnp.asarray(w), jnp.asarray(theta)
    return ((1 - share) * w + share * constraint.quantize(w, scale)).astype(w.dtype)


def rise(step: ArrayLike, start: ArrayLike, end: ArrayLike) -> jax.Array:
    """Returns the share of the way from `start` to `end`: 0 before, 1 after."""
    share = (jnp.asarray(step) - start) / (jnp.asarray(end) - start)
    return jnp.clip(share, 0.0, 1.0)


def mirrored_sigmoid(
    step: ArrayLike,
    start: ArrayLike,
    end: ArrayLike,
    steepness: ArrayLike = 10.0,
    center: ArrayLike = 0.5,
) -> jax.Array:
    """Returns PARQ's inverse slope, which falls from 1 at `start` to 0 at `end` along a sigmoid.

    With the share `x` of the way, steepness `s`, center `c` and `f(x) = 1 / (1 + exp(s (x - c)))`
    it is `(f(x) - f(1)) / (f(0) - f(1))`, so that both ends are met whatever the center. In a form
    that keeps its relative precision near the end, where weights are divided by it:

        sinh(s (1 - x) / 2) / sinh(s / 2) * cosh(s c / 2) / cosh(s (x - c) / 2)

    Args:
      step: number of the step; may be traced.
      start: the step up to which it is 1.
      end: the step from which on it is 0, after `start`.
      steepness: of the sigmoid, above 0 and up to 100; below 1 it is almost a line.
      center: the share of the way at which it is steepest.

    Returns:
      Array of shape (), float32, or float64 under x64.

    Reference: Jin et al. (2025), section 5.
    """
    step, start, end = (jnp.asarray(number) for number in (step, start, end))
    x = rise(step, start, end)
    # Not 1 - x, which rounds.
    left = jnp.clip((end - step) / (end - start), 0.0, 1.0)
    half = jnp.asarray(steepness, float) / 2
    fall = jnp.sinh(half * left) / jnp.sinh(half)
    return fall * (jnp.cosh(half * center) / jnp.cosh(half * (x - center)))
