"""The updates of constrained leaves in a tree of updates: found, checked, replaced."""

from collections.abc import Sequence

import jax

from cbp_jax.arguments import check_update
from cbp_jax.masking import PyTree, flatten_with_paths, path_string
from cbp_jax.state import ConstrainedLeaf


def add_to_updates(
    updates: PyTree, leaves: Sequence[ConstrainedLeaf], terms: Sequence[jax.Array]
) -> PyTree:
    """Adds a term to the update of each constrained leaf, in the update's dtype.

    Raises:
      ValueError: as `updates_of` does.
      TypeError: likewise.
    """
    sums = [
        (update + term).astype(update.dtype)
        for update, term in zip(updates_of(leaves, updates), terms, strict=True)
    ]
    return replace_updates(updates, leaves, sums)


def updates_of(leaves: Sequence[ConstrainedLeaf], updates: PyTree) -> list[jax.Array]:
    """Returns the updates of the constrained leaves.

    Raises:
      ValueError: if the updates lack one of the leaves, or have another shape.
      TypeError: if they are not floating-point arrays.
    """
    by_path, found = dict(flatten_with_paths(updates)), []
    for leaf in leaves:
        update = by_path.get(leaf.path)
        if update is None:
            raise ValueError(
                f"the updates lack {path_string(leaf.path)!r}, which is constrained: "
                "give the gradients of all parameters"
            )
        check_update(path_string(leaf.path), update, leaf.weight.shape)
        found.append(update)
    return found


def replace_updates(
    updates: PyTree, leaves: Sequence[ConstrainedLeaf], new: Sequence[jax.Array]
) -> PyTree:
    """Returns the updates with those of the constrained leaves replaced."""
    by_path = dict(flatten_with_paths(updates))
    by_path.update({leaf.path: update for leaf, update in zip(leaves, new, strict=True)})
    return jax.tree.unflatten(jax.tree.structure(updates), list(by_path.values()))
