"""A description of a CBP state's constraints, mask and scale axes, to save with a checkpoint."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from cbp_jax.masking import path_string
from cbp_jax.state import constrained_parts, find_states

_FORMAT = 1
_MOST_SHOWN = 10  # differences in an error


def describe(opt_state: optax.OptState) -> dict[str, Any]:
    """Describes what checkpoints of arrays leave out: constrained leaves, levels and scale shapes.

    Constraints are part of a state's structure, not arrays. Orbax, for one, restores a binary state
    into a ternary one without an error, since their arrays have the same shapes. Save the
    description with the arrays, and give it to `check_description` with the state they are restored
    into.

    Args:
      opt_state: any optimizer state with one or more links' states in it, or its `jax.eval_shape`.

    Returns:
      A dictionary that `json.dumps` accepts: for the path of each constrained leaf the name and
      levels of its constraint, the shape of its scale, which shows the kept axes, and its own shape
      (not under `ste`, whose state holds nothing of that shape).

    Raises:
      ValueError: if the state holds no `CBPState`.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> state = cbp_jax.cbp("binary").init({"kernel": jnp.array([[0.5, -0.1]])})
      >>> cbp_jax.describe(state)["leaves"]["kernel"]
      {'constraint': 'binary', 'levels': [-1.0, 1.0], 'scale_shape': [], 'shape': [1, 2]}
    """
    leaves: dict[str, Any] = {}
    for state in find_states(opt_state):
        for path, constraint, scale, multiplier in constrained_parts(state):
            leaves[path_string(path)] = {
                "constraint": constraint.name,
                "levels": list(constraint.levels),
                "scale_shape": list(jnp.shape(scale)),
            }
            if multiplier is not None:
                leaves[path_string(path)]["shape"] = list(jnp.shape(multiplier))
    return {"format": _FORMAT, "leaves": leaves}


def check_description(opt_state: optax.OptState, description: Mapping[str, Any]) -> None:
    """Checks that a state has the constrained leaves, levels and scale shapes described.

    Args:
      opt_state: the state that saved arrays are, or will be, restored into.
      description: the saved result of `describe`.

    Raises:
      ValueError: if they differ; the error lists the leaves, with what was saved and what is here.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[0.5, -0.1], [0.3, 0.9]])}
      >>> saved = cbp_jax.describe(cbp_jax.cbp("binary").init(params))
      >>> cbp_jax.check_description(cbp_jax.cbp("binary", scale_axis=-1).init(params), saved)
      Traceback (most recent call last):
      ValueError: this state differs from the one that was saved:
        kernel: scale_shape saved [], here [1, 2]
      make the optimizer with the constraint, mask and scale_axis that the saved state had
    """
    leaves = description.get("leaves") if isinstance(description, Mapping) else None
    described = isinstance(leaves, Mapping) and all(
        isinstance(leaf, Mapping) for leaf in leaves.values()
    )
    if not described or _plain(description.get("format")) != _FORMAT:
        raise ValueError(
            f"this is no description of cbp_jax.describe, format {_FORMAT}: "
            f"{str(description)[:200]}"
        )
    saved, here = description["leaves"], describe(opt_state)["leaves"]
    differences = {path: _difference(saved.get(path), here.get(path)) for path in {**saved, **here}}
    lines = [f"  {path}: {difference}" for path, difference in differences.items() if difference]
    if not lines:
        return
    if len(lines) > _MOST_SHOWN:
        lines[_MOST_SHOWN:] = [f"  and {len(lines) - _MOST_SHOWN} more"]
    start = "this state differs from the one that was saved:"
    advice = "make the optimizer with the constraint, mask and scale_axis that the saved state had"
    raise ValueError("\n".join([start, *lines, advice]))


def _difference(saved: Mapping[str, Any] | None, here: Mapping[str, Any] | None) -> str:
    if saved is None or here is None:
        return f"saved {_constraint_name(saved)}, here {_constraint_name(here)}"
    return "; ".join(
        f"{name} saved {saved.get(name)!r}, here {value!r}"
        for name, value in here.items()
        if _plain(saved.get(name)) != value
    )


def _plain(value: Any) -> Any:
    """What JSON has for a value: a checkpoint may have made arrays or tuples of lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float) else repr(value)


def _constraint_name(leaf: Mapping[str, Any] | None) -> str:
    return "unconstrained" if leaf is None else str(leaf.get("constraint"))
