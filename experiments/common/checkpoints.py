"""Orbax checkpoints of a training state, which remember what the state was."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

PyTree = Any


def save(path: Path, tree: PyTree) -> None:
    """Writes a tree to a folder, which is replaced if it is there."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(tree=ocp.args.StandardSave(tree), structure=ocp.args.JsonSave(_structure(tree)))
        checkpointer.save(path.absolute(), args=items, force=True)


def restore(path: Path, like: PyTree) -> PyTree:
    """Reads a tree of the structure, shapes, dtypes and shardings of another.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it holds another tree, a CBP state under another constraint too: Orbax itself looks at arrays alone.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        saved = checkpointer.restore(path.absolute(), args=ocp.args.Composite(structure=ocp.args.JsonRestore())).structure
        asked = _structure(like)
        if saved != asked:
            raise ValueError(f"{path} holds another tree than asked for:\n  saved: {saved['tree']}\n  asked: {asked['tree']}")
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(tree=ocp.args.StandardRestore(template))
        return checkpointer.restore(path.absolute(), args=items).tree


def _structure(tree: PyTree) -> dict[str, str]:
    """The tree's structure in words, its constraints among them."""
    return {"tree": str(jax.tree.structure(tree))}
