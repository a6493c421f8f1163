"""A constraint: the levels that a weight may take, and the elementwise functions CBP needs of them.

With levels `Q` in units of a scale `a`, and `q(w)` the level nearest to the weight `w`, times `a`:

    violation(w, g) = 2 |w - q(w)|          where the constraint is active, else 0
    gradient(w, g)  = 2 sign(w - q(w))      where the constraint is active, else 0

The constraint is always active outside the outermost levels. Between two neighboring levels, `gap`
apart, it is active where `2 |w - q(w)| <= gap * (1 - 1/g)`. So as the window `g` grows from 1 to
infinity, the free zone around each midpoint shrinks from the whole gap to nothing.

Reference: Kim and Jeong, "CBP: backpropagation with constraint on weight precision using a
pseudo-Lagrange multiplier method", NeurIPS 2021, section 3.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cbp_jax.arguments import as_number, as_real_array, as_scalar, check_number, shown
from cbp_jax.step_function import step_function


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Constraint:
    """The set of values that a constrained weight may take, in units of its scale.

    A constraint is frozen, hashable and a static pytree node (without leaves), so a state that
    holds one carries it in its tree structure.

    Args:
      name: the name shown in reports.
      levels: at least two finite numbers, strictly increasing, in units of the scale.

    Raises:
      ValueError: if there are fewer than two levels, or they are not finite or not strictly
        increasing, in float32 too.
      TypeError: if the name is not a string, or the levels are not numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from cbp_jax import Constraint
      >>> constraint = Constraint("asymmetric", (-1.0, 0.0, 2.0))
      >>> constraint.bits
      2
      >>> print(constraint.quantize(jnp.array([-0.7, 0.3, 0.9]), scale=0.5))
      [-0.5  0.   1. ]

    Reference: Kim and Jeong (2021), section 3.
    """

    name: str
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(
                f"a constraint's name must be a string, got {self.name!r}: "
                "write Constraint(name, levels)"
            )
        start = f"constraint {self.name!r} needs"
        try:
            numbers = [as_number(level) for level in self.levels]
        except TypeError:  # one number, say
            numbers = [None]
        levels = tuple(number for number in numbers if number is not None)
        if len(levels) < len(numbers):
            raise TypeError(f"{start} a sequence of numbers as levels, got {shown(self.levels)}")
        if len(levels) < 2:
            raise ValueError(f"{start} at least two levels, got {levels}")
        if not all(map(math.isfinite, levels)):
            raise ValueError(f"{start} finite levels, got {levels}")
        if any(low >= high for low, high in itertools.pairwise(levels)):
            raise ValueError(
                f"{start} strictly increasing levels, got {levels}: "
                f"write {tuple(sorted(set(levels)))}"
            )
        with np.errstate(over="ignore"):
            rounded = [float(np.float32(level)) for level in levels]
        if not all(map(math.isfinite, rounded)) or len(set(rounded)) < len(levels):
            raise ValueError(
                f"{start} levels that differ, and are finite, in float32, got {levels}"
            )
        object.__setattr__(self, "levels", levels)

    @property
    def bits(self) -> int:
        """The number of bits of a level's index: `ceil(log2(number of levels))`."""
        return (len(self.levels) - 1).bit_length()

    def quantize(self, w: ArrayLike, scale: ArrayLike) -> jax.Array:
        """Returns `q(w)`: for each weight the nearest level, times the scale.

        A weight exactly on a midpoint goes to the upper level; NaN stays NaN.

        Args:
          w: weights, floating, any shape.
          scale: the unit of the levels, shape () or broadcastable to `w`, not negative.

        Returns:
          Array of the shape and dtype of `w`.

        Example:
          >>> import jax.numpy as jnp, cbp_jax
          >>> print(cbp_jax.ternary().quantize(jnp.array([-0.9, 0.1, 0.25]), scale=0.5))
          [-0.5  0.   0.5]

        Reference: Kim and Jeong (2021), section 3.
        """
        w, dtype, scale = _prepare(w, scale)
        return jnp.where(jnp.isnan(w), w, self._nearest(w, scale)).astype(dtype)

    def violation(self, w: ArrayLike, scale: ArrayLike, window: ArrayLike = math.inf) -> jax.Array:
        """The constraint function: `2 |w - q(w)|` where the constraint is active, else 0.

        Args:
          w: weights, floating, any shape.
          scale: the unit of the levels, shape () or broadcastable to `w`; where it is 0 the
            violation is 0.
          window: `g >= 1`, shape (); at infinity the constraint is active everywhere.

        Returns:
          Array of the shape of `w`, in the unit of the weights, of dtype
          `promote_types(w.dtype, float32)`.

        Example:
          >>> import jax.numpy as jnp, cbp_jax
          >>> w = jnp.array([0.0, 0.375, 0.75])
          >>> print(cbp_jax.binary().violation(w, scale=0.5))
          [1.   0.25 0.5 ]
          >>> print(cbp_jax.binary().violation(w, scale=0.5, window=2.0))
          [0.   0.25 0.5 ]

        Reference: Kim and Jeong (2021), equations 5 to 7; the closed form is this project's.
        """
        w, dtype, scale = _prepare(w, scale)
        offset = self._offset(w, dtype, scale)
        return jnp.where(self._active(w, scale, offset, window), 2 * jnp.abs(offset), 0)

    def violation_grad(
        self, w: ArrayLike, scale: ArrayLike, window: ArrayLike = math.inf
    ) -> jax.Array:
        """The derivative of `violation`: `2 sign(w - q(w))` where the constraint is active, else 0.

        Args:
          w: weights, floating, any shape.
          scale: the unit of the levels, shape () or broadcastable to `w`; where it is 0 the
            gradient is 0.
          window: `g >= 1`, shape (); at infinity the constraint is active everywhere.

        Returns:
          Array of the shape of `w`, of dtype `promote_types(w.dtype, float32)` and values -2, 0
          and 2. It is 0 exactly on a level.

        Example:
          >>> import jax.numpy as jnp, cbp_jax
          >>> print(cbp_jax.binary().violation_grad(jnp.array([0.1, 0.5, 0.75]), scale=0.5))
          [-2.  0.  2.]

        Reference: Kim and Jeong (2021), equation 8.
        """
        w, dtype, scale = _prepare(w, scale)
        offset = self._offset(w, dtype, scale)
        return jnp.where(self._active(w, scale, offset, window), 2 * jnp.sign(offset), 0)

    def level_index(self, w: ArrayLike, scale: ArrayLike) -> jax.Array:
        """The index into `levels` of the level nearest to each weight; arguments as in `quantize`.

        Returns:
          Array of the shape of `w`, int32.

        Example:
          >>> import jax.numpy as jnp, cbp_jax
          >>> print(cbp_jax.ternary().level_index(jnp.array([-0.9, 0.1, 0.25]), scale=0.5))
          [0 1 2]
        """
        w, _, scale = _prepare(w, scale)
        return step_function(w, scale, self._midpoints, range(len(self.levels)), jnp.int32)

    @property
    def _midpoints(self) -> tuple[float, ...]:
        return tuple((low + high) / 2 for low, high in itertools.pairwise(self.levels))

    @property
    def _gaps(self) -> tuple[float, ...]:
        gaps = tuple(high - low for low, high in itertools.pairwise(self.levels))
        even = max(gaps) - min(gaps) <= 1e-12 * max(gaps)  # up to rounding
        return gaps[:1] * len(gaps) if even else gaps

    def _nearest(self, w: jax.Array, scale: jax.Array) -> jax.Array:
        return step_function(w, scale, self._midpoints, self.levels, w.dtype) * scale

    def _offset(self, w: jax.Array, dtype: jnp.dtype, scale: jax.Array) -> jax.Array:
        """`w - q(w)`, with `q(w)` rounded to `dtype` so that a stored level violates nothing."""
        nearest = self._nearest(w, scale)
        if dtype != w.dtype:
            return w - round_to(dtype, nearest)
        # XLA may fuse the product and the difference; rounding must not put a weight off its level.
        return jnp.where(w == nearest, 0, w - nearest)

    def _active(
        self, w: jax.Array, scale: jax.Array, offset: jax.Array, window: ArrayLike
    ) -> jax.Array:
        """Where the constraint is active; nowhere if the scale is 0."""
        if not isinstance(window, jax.Array):
            check_number("window", window, "a number of at least 1", 1)
        window = as_scalar("window must be a number of at least 1", window, w.dtype)
        # At an infinite window nothing may escape: no midpoint through rounding, no gap that is
        # flushed to 0.
        share = jnp.where(jnp.isinf(window), jnp.finfo(w.dtype).max, (1 - 1 / window) / 2)
        gap = step_function(w, scale, self.levels[1:-1], self._gaps, w.dtype) * scale
        outside = ~((w >= self.levels[0] * scale) & (w <= self.levels[-1] * scale))
        return (outside | (jnp.abs(offset) <= gap * share)) & (scale > 0)


def _prepare(w: ArrayLike, scale: ArrayLike) -> tuple[jax.Array, jnp.dtype, jax.Array]:
    """The weights in the dtype of the computation, their own dtype, and the scale in the former."""
    w, unit = as_real_array("weights", w), as_real_array("scale", scale)
    if not _broadcasts(unit.shape, w.shape):
        raise ValueError(f"scale has shape {unit.shape}, which weights of {w.shape} do not have")
    if not jnp.issubdtype(w.dtype, jnp.floating):
        w = w.astype(float)
    compute = jnp.promote_types(w.dtype, jnp.float32)
    if isinstance(scale, int | float | np.ndarray | np.generic):  # JAX's are not waited for
        values, most = np.asarray(scale), float(jnp.finfo(compute).max)
        if not np.all((values >= 0) & (values <= most)):
            raise ValueError(
                f"scale must not be negative, NaN or beyond {compute}, got {shown(scale)}"
            )
    return w.astype(compute), w.dtype, unit.astype(compute)


def round_to(dtype: jnp.dtype, x: jax.Array) -> jax.Array:
    """Rounds to a narrower dtype: XLA may keep excess precision and drop a pair of casts."""
    info = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(x, info.nexp, info.nmant)
    if info.smallest_normal <= jnp.finfo(x.dtype).smallest_normal:
        return rounded
    # It takes float16's subnormal numbers, which weights may be, for 0.
    step = float(info.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(info.smallest_normal), jnp.round(x / step) * step, rounded)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(to), strict=False)
    )
