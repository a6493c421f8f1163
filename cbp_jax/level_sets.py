"""The level sets: the paper's four, signed powers of two, and evenly spaced levels."""

import dataclasses
import difflib
import functools
import math

from cbp_jax.constraints import Constraint


def binary() -> Constraint:
    """Levels `{-a, a}`: 1 bit per weight.

    Returns:
      The constraint named "binary".

    Example:
      >>> import cbp_jax
      >>> cbp_jax.binary().levels
      (-1.0, 1.0)

    Reference: Kim and Jeong (2021), section 4.
    """
    return Constraint("binary", (-1.0, 1.0))


def ternary() -> Constraint:
    """Levels `{-a, 0, a}`: 2 bits per weight.

    Returns:
      The constraint named "ternary".

    Example:
      >>> import cbp_jax
      >>> cbp_jax.ternary().levels
      (-1.0, 0.0, 1.0)

    Reference: Kim and Jeong (2021), section 4.
    """
    return Constraint("ternary", (-1.0, 0.0, 1.0))


def one_bit_shift() -> Constraint:
    """Levels `{0, ±a/2, ±a}`: 3 bits per weight; a product is a shift by at most one bit.

    Returns:
      The constraint named "one_bit_shift".

    Example:
      >>> import cbp_jax
      >>> cbp_jax.one_bit_shift().levels
      (-1.0, -0.5, 0.0, 0.5, 1.0)

    Reference: Kim and Jeong (2021), section 4.
    """
    return dataclasses.replace(shift(1), name="one_bit_shift")


def two_bit_shift() -> Constraint:
    """Levels `{0, ±a/4, ±a/2, ±a}`: 3 bits per weight; a product is a shift by at most two bits.

    Returns:
      The constraint named "two_bit_shift".

    Example:
      >>> import cbp_jax
      >>> cbp_jax.two_bit_shift().levels
      (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)

    Reference: Kim and Jeong (2021), section 4.
    """
    return dataclasses.replace(shift(2), name="two_bit_shift")


def shift(depth: int) -> Constraint:
    """Zero and signed powers of two: levels `{0, ±2^-d}` for d = 0..depth.

    Args:
      depth: the largest shift, 0 to 64. `shift(0)` has the levels of `ternary()`, `shift(1)` those
        of `one_bit_shift()`, `shift(2)` those of `two_bit_shift()`.

    Returns:
      A constraint with `2 * depth + 3` levels.

    Raises:
      ValueError: if the depth is not an integer from 0 to 64.

    Example:
      >>> import cbp_jax
      >>> len(cbp_jax.shift(6).levels), cbp_jax.shift(6).bits
      (15, 4)
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or not 0 <= depth <= 64:
        raise ValueError(f"shift needs an integer depth of 0 to 64, got {depth!r}")
    powers = [2.0**-d for d in range(depth + 1)]
    return Constraint(f"shift{depth}", (*(-p for p in powers), 0.0, *reversed(powers)))


def uniform(bits: int) -> Constraint:
    """Evenly spaced symmetric levels that include 0: `k * s` for `|k| < 2^(bits - 1)`.

    The step `s` minimises the mean squared error on Gaussian weights of mean absolute value 1, the
    default scale. With `sigma = sqrt(pi / 2)`, `t = s / sigma`, `K = 2^(bits - 1) - 1`, edges
    `x_k = (k - 1/2) t`, and density `phi` and upper tail `Q` of the normal distribution:

        error(t) = sigma^2 (1 - 4 t sum_k phi(x_k) + 2 t^2 sum_k (2 k - 1) Q(x_k)),   k = 1 .. K

    Args:
      bits: bits per weight, 2 to 12.

    Returns:
      A constraint with `2^bits - 1` levels.

    Raises:
      ValueError: if `bits` is not an integer from 2 to 12.

    Example:
      >>> import cbp_jax
      >>> [round(level, 3) for level in cbp_jax.uniform(2).levels]
      [-1.534, 0.0, 1.534]

    Reference: Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory,
      1960, for the optimal step.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 12:
        raise ValueError(
            f"uniform needs an integer number of bits, 2 to 12, got {bits!r}: "
            "for one bit use binary()"
        )
    return _uniform(bits)


@functools.cache
def _uniform(bits: int) -> Constraint:
    from scipy import optimize  # a dependency of jax; imported late because it is slow to load

    highest = 2 ** (bits - 1) - 1

    def error(step: float) -> float:
        edges = [(k - 0.5) * step for k in range(1, highest + 1)]
        density = sum(math.exp(-x * x / 2) for x in edges) / math.sqrt(2 * math.pi)
        tail = sum((2 * k - 1) * math.erfc(x / math.sqrt(2)) / 2 for k, x in enumerate(edges, 1))
        return 1 - 4 * step * density + 2 * step * step * tail

    # The best highest level lies between half a standard deviation and ten.
    found = optimize.minimize_scalar(
        error, bounds=(0.5 / highest, 10 / highest), method="bounded", options={"xatol": 1e-10}
    )
    # Rounded to 12 binary digits, so that float32 holds all levels and midpoints exactly; this
    # changes the error by less than 1e-7.
    mantissa, exponent = math.frexp(float(found.x) * math.sqrt(math.pi / 2))
    step = math.ldexp(round(mantissa * 2**12), exponent - 12)
    return Constraint(f"uniform{bits}", tuple(k * step for k in range(-highest, highest + 1)))


_NAMED = {rule.name: rule for rule in (binary(), ternary(), one_bit_shift(), two_bit_shift())}

CONSTRAINTS = tuple(_NAMED)  # the names that `get_constraint` and `cbp` accept


def get_constraint(name_or_constraint: str | Constraint) -> Constraint:
    """Returns the constraint of that name; a `Constraint` is returned unchanged.

    Args:
      name_or_constraint: one of `cbp_jax.CONSTRAINTS` ("binary", "ternary", "one_bit_shift",
        "two_bit_shift"), or a `Constraint`.

    Returns:
      The constraint.

    Raises:
      ValueError: if no constraint has that name; the error lists the known names.
      TypeError: if the argument is neither a name nor a constraint.

    Example:
      >>> import cbp_jax
      >>> cbp_jax.get_constraint("binary") == cbp_jax.binary()
      True
    """
    if isinstance(name_or_constraint, Constraint):
        return name_or_constraint
    if not isinstance(name_or_constraint, str):
        raise TypeError(
            f"a constraint is a name or a Constraint, got {name_or_constraint!r} "
            f"({type(name_or_constraint).__name__})"
        )
    if name_or_constraint not in _NAMED:
        close = difflib.get_close_matches(name_or_constraint, CONSTRAINTS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown constraint {name_or_constraint!r}; known are "
            f"{', '.join(map(repr, CONSTRAINTS))}.{hint} "
            "For other levels use shift(depth), uniform(bits) or Constraint(name, levels)."
        )
    return _NAMED[name_or_constraint]
