"""Checks of arguments, where they enter; a traced number passes, for it has no value."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

# Weights and multipliers are computed with in float32 or more, to which only these are promoted.
_DTYPES = ("float16", "bfloat16", "float32", "float64")
LARGEST = float(np.finfo(np.float32).max)  # of the numbers that are to be finite
_LONGEST = 200  # characters of a value in a message


def check_count(name: str, number: Any) -> Any:
    """Checks a whole number of at least 1; values above int32 are clamped (never reached).

    Args:
      name: of the argument.
      number: of Python or numpy, or an array of JAX, as under `optax.inject_hyperparams`.
    """
    if isinstance(number, jax.core.Tracer):
        return number
    value = as_number(number)
    if value is None or not (1 <= value < math.inf and value == math.floor(value)):
        raise ValueError(
            f"{name} must be a whole number of at least 1, got {shown(number)} "
            f"({type(number).__name__})"
        )
    return number if isinstance(number, jax.Array) else min(int(value), 2**31 - 1)


def check_number(
    name: str, number: Any, expected: str, low: float, high: float = math.inf, *, open_at: str = ""
) -> Any:
    """Checks a number; `open_at` has "low" or "high" in it if that bound itself is excluded.

    Returns:
      The number; integers beyond the floats are infinite.

    Raises:
      ValueError: if it is no number, or out of range; the message says `expected`.
    """
    if isinstance(number, jax.core.Tracer):
        return number
    value = as_number(number)
    if value is not None:
        above = value > low if "low" in open_at else value >= low
        below = value < high if "high" in open_at else value <= high
        if above and below:
            return number if isinstance(number, jax.Array) else value
    raise ValueError(f"{name} must be {expected}, got {shown(number)}")


def check_rate(name: str, rate: Any) -> Any:
    """Checks a learning rate, a finite number of at least 0; what a schedule returns, when called.

    Raises:
      ValueError: if it is no such number; the schedule returned here, if it gives none.
    """
    if not callable(rate):
        expected = "a number of at least 0 or a schedule of them"
        return check_number(name, rate, expected, 0, LARGEST)
    return lambda count: as_scalar(f"{name}, a schedule, must return a number", rate(count))


def as_scalar(expected: str, value: Any, dtype: DTypeLike | None = None) -> jax.Array:
    """Returns a real number as an array of shape (); raises ValueError, with `expected`, if not."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        if value.shape == () and _is_real(value.dtype):
            return jnp.asarray(value, dtype)
        got = f"{value.dtype} of shape {value.shape}"
    else:
        number, got = as_number(value), shown(value)
        if number is not None:
            return jnp.asarray(number, dtype)
    raise ValueError(f"{expected}, a scalar; got {got}")


def as_real_array(name: str, value: Any) -> jax.Array:
    """Returns an array of real numbers or bools; raises TypeError for anything else."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be an array of real numbers, got {shown(value)}") from error
    if not (_is_real(array.dtype) or array.dtype == bool):
        raise TypeError(f"{name} must be real, got {array.dtype}: take its parts one by one")
    return array


def check_weight(name: str, weight: Any) -> None:
    """Checks that a parameter can be constrained: an array of floating-point numbers.

    Raises:
      TypeError: if it cannot be.
    """
    kind = getattr(weight, "dtype", None)
    if not is_array(weight):
        without = ", without values (for shapes alone use jax.eval_shape)"
        kind = f"{type(weight).__name__}{'' if kind is None else without}"
    elif str(kind) in _DTYPES:
        return
    raise TypeError(
        f"{name!r} cannot be constrained: it is {kind}, and only arrays of "
        f"{', '.join(_DTYPES)} can be; leave it out of the mask"
    )


def check_update(name: str, update: Any, shape: tuple[int, ...]) -> None:
    """Checks that an update, such as a gradient, fits a weight of this name and shape.

    Raises:
      TypeError: if it is not a floating-point array.
      ValueError: if it has another shape.
    """
    if not is_array(update) or not jnp.issubdtype(update.dtype, jnp.floating):
        kind = update.dtype if is_array(update) else type(update).__name__
        raise TypeError(
            f"the update of {name!r} is {kind}: give floating-point arrays, as jax.grad does"
        )
    if update.shape != shape:
        raise ValueError(f"the update of {name!r} has shape {update.shape}, its weights {shape}")


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array with values, if only traced ones."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_numeric(dtype: Any) -> bool:
    """Whether an array of a dtype holds numbers or bools, and not strings, objects or keys."""
    return jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)


def floating_dtype(dtype: Any) -> np.dtype | None:
    """The floating-point dtype that an argument names, or None if it names none."""
    try:
        found = jnp.dtype(dtype)
    except (TypeError, ValueError):
        return None
    return found if dtype is not None and jnp.issubdtype(found, jnp.floating) else None


def check_multiplier_dtype(dtype: Any) -> np.dtype | None:
    """Returns the dtype of multipliers, or None for None.

    Raises:
      ValueError: if it is none of the dtypes of weights.
    """
    found = floating_dtype(dtype)
    if dtype is not None and str(found) not in _DTYPES:
        raise ValueError(
            f"multiplier_dtype must be a floating dtype of 16 bits or more, got {shown(dtype)}"
        )
    return found


def check_function(name: str, function: Callable[..., Any] | None, form: str) -> None:
    """Checks that an argument can be called; None is right.

    Raises:
      TypeError: if it cannot be.
    """
    if function is not None and not callable(function):
        raise TypeError(f"{name} must be a function {form}, or None, got {shown(function)}")


def check_optimizer(name: str, optimizer: Any) -> None:
    """Checks that an argument is an optax optimizer, or a class with the same methods."""
    if not all(callable(getattr(optimizer, method, None)) for method in ("init", "update")):
        got = type(optimizer).__name__
        if callable(optimizer):
            got = f"a function: call it, {name}={getattr(optimizer, '__name__', 'it')}(...)"
        raise TypeError(f"{name} must be an optax optimizer, got {got}")


def as_number(value: Any) -> float | None:
    """The value as a float; None if it is no real number: a bool, say, or a string."""
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return float(np.asarray(value)) if value.shape == () and _is_real(value.dtype) else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.inf if value > 0 else -math.inf


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)


def shown(value: Any) -> str:
    """A value as it is shown in a message."""
    if isinstance(value, int) and value.bit_length() > 8 * _LONGEST:  # Python may refuse to
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
