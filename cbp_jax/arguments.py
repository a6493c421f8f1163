"""Checks of arguments that have no array in them; what is traced passes, for it has no value."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_count(name: str, number: Any) -> Any:
    """Checks a whole number of at least 1; values above int32 are clamped (never reached).

    Args:
      name: of the argument.
      number: of Python or numpy, or an array of JAX, as under `optax.inject_hyperparams`.
    """
    if isinstance(number, jax.core.Tracer):
        return number
    value = _number(number)
    if value is None or not (1 <= value < math.inf and value == math.floor(value)):
        raise ValueError(
            f"{name} must be a whole number of at least 1, got {number!r} ({type(number).__name__})"
        )
    return number if isinstance(number, jax.Array) else min(int(value), 2**31 - 1)


def check_number(
    name: str, number: Any, expected: str, low: float, high: float = math.inf, *, open_at: str = ""
) -> None:
    """Checks a number; `open_at` has "low" or "high" in it if that bound itself is excluded.

    Raises:
      ValueError: if it is no number, or out of range; the message says `expected`.
    """
    if isinstance(number, jax.core.Tracer):
        return
    value = _number(number)
    if value is not None:
        above = value > low if "low" in open_at else value >= low
        below = value < high if "high" in open_at else value <= high
        if above and below:
            return
    raise ValueError(f"{name} must be {expected}, got {number!r}")


def check_optimizer(name: str, optimizer: Any) -> None:
    """Checks that an argument is an optax optimizer, or a class with the same methods."""
    if not all(callable(getattr(optimizer, method, None)) for method in ("init", "update")):
        got = type(optimizer).__name__
        if callable(optimizer):
            got = f"a function: call it, {name}={getattr(optimizer, '__name__', 'it')}(...)"
        raise TypeError(f"{name} must be an optax optimizer, got {got}")


def _number(value: Any) -> float | None:
    """The value as a float; None if it is no real number: a bool, say, or a string."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.asarray(value)
        real = jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)
        return float(array) if array.ndim == 0 and real else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf
