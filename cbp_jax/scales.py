"""Measures the scales of constrained leaves."""

import math
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cbp_jax.arguments import as_real_array, shown
from cbp_jax.constraints import Constraint, round_to
from cbp_jax.masking import Path, path_string

ScaleFn = Callable[[jax.Array, tuple[int, ...]], jax.Array]  # weights, kept axes -> scale
SCALE_FORM = "(w, kept axes) -> scale"  # in messages

# With no more weights per level than this, distinct values do not tell whether they are quantized.
_FEW_PER_LEVEL = 4


def mean_absolute_value(w: jax.Array, kept_axes: tuple[int, ...]) -> jax.Array:
    """The default scale: `mean |w|` over all axes but the kept ones."""
    axes = tuple(axis for axis in range(w.ndim) if axis not in kept_axes)
    return jnp.mean(jnp.abs(w), axis=axes, keepdims=bool(kept_axes))


def float16_scale(w: jax.Array, kept_axes: tuple[int, ...]) -> jax.Array:
    """The default scale, rounded to a float16 number: for `scale_fn`, if that is to hold it.

    The network is then trained with the scales that `export_gguf` stores:

        scale = float16(mean |w|)

    Args:
      w: the weights.
      kept_axes: the axes along which scales differ, counted from 0.

    Returns:
      Array of the dtype of `w`, of shape () or with the kept dimensions.

    Raises:
      ValueError: if there are no weights.
      TypeError: if the weights are not real numbers, or the axes no tuple of integers.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.1, 0.3]])}
      >>> link = cbp_jax.cbp(constraint="binary", scale_fn=cbp_jax.float16_scale)
      >>> print(link.init(params).weight_scale["kernel"])
      0.19995117
    """
    w = as_real_array("weights", w)
    if w.size == 0:
        raise ValueError(f"weights of shape {w.shape} have no scale: they are empty")
    if not isinstance(kept_axes, tuple) or not all(isinstance(axis, int) for axis in kept_axes):
        raise TypeError(f"kept_axes is a tuple of integers, got {shown(kept_axes)}")
    return round_to(jnp.dtype(jnp.float16), mean_absolute_value(w, kept_axes))


def measure_scale(
    path: Path,
    w: jax.Array,
    constraint: Constraint,
    kept_axes: Sequence[int],
    scale_fn: ScaleFn | None,
) -> jax.Array:
    """Returns a leaf's scale, in the dtype of the computation.

    A scale below the smallest normal number of that dtype is 0, whether a backend would flush it
    to 0 or not.

    Raises:
      ValueError: if the leaf lacks a kept axis or has no others, or the scale has the wrong shape;
        outside of `jit` also if it is negative, not finite or zero throughout, or levels overflow.
      TypeError: if `scale_fn` does not return numbers.
    """
    compute = jnp.promote_types(w.dtype, jnp.float32)
    kept = normalize_axes(path, w.ndim, kept_axes)
    shape = tuple(n if axis in kept else 1 for axis, n in enumerate(w.shape)) if kept else ()
    if w.size == 0:
        return jnp.zeros(shape, compute)
    name = repr(path_string(path))
    if kept and math.prod(shape) == w.size > 1:
        raise ValueError(
            f"scale_axis={tuple(kept_axes)} keeps every axis of {name}, of shape {w.shape}: each "
            "weight would have its own scale and start on a level. Exclude this leaf with "
            "mask=cbp_jax.select(exclude=...), or keep fewer axes"
        )
    measured = (scale_fn or mean_absolute_value)(w.astype(compute), kept)
    scale = as_real_array(f"the scale that scale_fn gave {name}", measured).astype(compute)
    if scale.shape != shape:
        raise ValueError(
            f"scale_fn gave {name} a scale of shape {scale.shape}; shape {shape} was expected"
        )
    smallest = jnp.finfo(compute).smallest_normal
    scale = _replicate(jnp.where(jnp.abs(scale) < smallest, 0, scale))
    if not isinstance(scale, jax.core.Tracer) and (
        scale.is_fully_addressable or scale.is_fully_replicated
    ):
        values = np.asarray(scale)
        if not np.all(np.isfinite(values)) or np.any(values < 0):
            raise ValueError(
                f"the scale of {name} is negative or not finite: check its weights, and scale_fn"
            )
        _check_range(name, w, constraint, float(np.max(values)), compute)
        here = getattr(w, "is_fully_addressable", True)
        if np.all(values == 0) and here and np.any(np.asarray(w) != 0):
            raise ValueError(
                f"the scale of {name} is below the smallest normal {compute}, {smallest:.2g}, "
                "though its weights are not all 0: check its weights, and scale_fn"
            )
        if np.all(values == 0):
            raise ValueError(
                f"the scale of {name} is 0, because all its weights are: load the pre-trained "
                "weights before optimizer.init, or leave this leaf out with "
                "mask=cbp_jax.select(exclude=...)"
            )
    return scale


def _check_range(
    name: str, w: jax.Array, constraint: Constraint, scale: float, compute: jnp.dtype
) -> None:
    """Raises ValueError if the outermost levels, or the gaps between them, are infinite."""
    outermost = max(map(abs, constraint.levels)) * scale
    most, most_computed = (float(jnp.finfo(dtype).max) for dtype in (w.dtype, compute))
    if outermost > most or 2 * outermost > most_computed:
        raise ValueError(
            f"the levels of {name} overflow {w.dtype}: the outermost is {outermost:.3g}, with a "
            f"scale of {scale:.3g}. Check its weights, and scale_fn, or leave this leaf out with "
            "mask=cbp_jax.select(exclude=...)"
        )


def warn_if_quantized(
    path: Path, w: jax.Array, constraint: Constraint, kept_axes: Sequence[int]
) -> None:
    """Warns, outside of `jit`, if a leaf has no more distinct values (per scale) than levels."""
    most = len(constraint.levels)
    if isinstance(w, jax.core.Tracer) or not getattr(w, "is_fully_addressable", True) or not w.size:
        return
    kept = normalize_axes(path, w.ndim, kept_axes)
    one_scale = tuple(0 if axis in kept else slice(None) for axis in range(w.ndim))
    if math.prod(n for axis, n in enumerate(w.shape) if axis not in kept) <= _FEW_PER_LEVEL * most:
        return
    # First a sample of one shard: it shows float weights to differ, so that a large leaf need not
    # leave the device.
    shard = w.addressable_data(0) if isinstance(w, jax.Array) else w
    distinct = _count_distinct(shard[one_scale].reshape(-1)[: _FEW_PER_LEVEL * most])
    if distinct <= most:
        distinct = _count_distinct(np.asarray(w)[one_scale])
    if not 1 < distinct <= most:  # the scale of a constant leaf is right
        return
    warnings.warn(
        f"{path_string(path)!r} has {distinct} distinct values for the {most} levels of "
        f"{constraint.name!r}: it looks quantized already, and the scale measured on it may not be "
        "the one it was quantized with. Restore the optimizer state that belongs to these weights "
        "instead of calling init, or give init the latent weights",
        stacklevel=2,
    )


def _count_distinct(weights: jax.Array | np.ndarray) -> int:
    return len(np.unique(np.asarray(weights, np.float64)))


def _replicate(scale: jax.Array) -> jax.Array:
    """Puts a scale on every device; in automatic mode under `jit` the compiler decides."""
    traced = isinstance(scale, jax.core.Tracer)
    sharding = jax.typeof(scale).sharding if traced else scale.sharding
    if not isinstance(sharding, NamedSharding) or (
        traced and AxisType.Explicit not in sharding.mesh.axis_types
    ):
        return scale
    everywhere = NamedSharding(sharding.mesh, PartitionSpec())
    return jax.sharding.reshard(scale, everywhere) if traced else jax.device_put(scale, everywhere)


def normalize_axes(path: Path, ndim: int, axes: Sequence[int]) -> tuple[int, ...]:
    """Returns the axes sorted and counted from 0; raises ValueError if the leaf lacks one."""
    for axis in axes:
        if not -ndim <= axis < ndim:
            raise ValueError(
                f"scale_axis {axis} does not exist in {path_string(path)!r}, which has {ndim} axes"
            )
    return tuple(sorted({axis % ndim for axis in axes}))
