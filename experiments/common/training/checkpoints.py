"""Orbax checkpoints of a training state, which remember what the state was and tell when they are damaged."""

import functools
import itertools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

PyTree = Any


def save(path: Path, tree: PyTree) -> None:
    """Writes a tree to a folder, which is replaced if it is there."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=_save_args({"tree": tree}, {}), force=True)


def restore(path: Path, like: PyTree) -> PyTree:
    """Reads a tree of the structure, shapes, dtypes and shardings of another.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it is damaged, or holds another tree, a CBP state under another constraint too:
        Orbax looks at arrays alone.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        return _restore(
            path, lambda args: checkpointer.restore(path.absolute(), args=args), {"tree": like}
        )[0]["tree"]


class AnotherTreeError(ValueError):
    """A checkpoint is sound, but of another network, optimizer or constraint."""


class Checkpoints:
    """The newest few checkpoints of a run, written while it goes on.

    Args:
      folder: where they are; it is made if it is not there.
      keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, trees: Mapping[str, PyTree], run: Mapping[str, Any]) -> None:
        """Copies the trees off the device and writes them in the background; `run` is what else must be remembered, as JSON."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=_save_args(trees, run))

    def restore_newest(
        self, like: Mapping[str, PyTree], put_aside: bool = False
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """The newest checkpoint that can be read: its step, its trees and `run`. None if there is
        none at all.

        A damaged one is passed over with a warning. Several hosts agree on which one they take.

        Args:
          like: by name, trees of the structures, shapes, dtypes and shardings to read, or of numpy
            arrays to read as such; other trees of the checkpoint are left.
          put_aside: once an older one was read, rename damaged ones to `damaged_<step>`, so that
            their steps can be saved again.

        Raises:
          AnotherTreeError: if the newest readable checkpoint holds another tree than `like`.
          ValueError: if there are checkpoints, none of which can be read.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged = []
        for step in steps:
            try:
                trees, run = _restore(
                    self._folder / str(step), functools.partial(self._restore_step, step), like
                )
            except AnotherTreeError:
                raise
            except Exception as error:  # Orbax and TensorStore raise what they like
                reason = str(error).strip().split("\n")[0][:200]
                warnings.warn(
                    f"the checkpoint of step {step} in {self._folder} cannot be read ({type(error).__name__}: {reason}): "
                    "trying the one before",
                    stacklevel=2,
                )
                damaged.append(step)
            else:
                if put_aside and damaged:
                    self._put_aside(damaged)
                return step, trees, run
        if steps:
            raise ValueError(
                f"none of the checkpoints in {self._folder} can be read (steps {steps}): give another workdir to start afresh"
            )
        return None

    def _restore_step(self, step: int, args: ocp.args.Composite) -> Any:
        return self._manager.restore(step, args=args)

    def _put_aside(self, steps: list[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                names = itertools.chain(
                    [f"damaged_{step}"], (f"damaged_{step}_{count}" for count in itertools.count(2))
                )
                free = next(name for name in names if not (self._folder / name).exists())
                (self._folder / str(step)).rename(self._folder / free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoint")
        self._manager.reload()

    def newest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, and ends."""
        self.wait()
        self._manager.close()


def _save_args(trees: Mapping[str, PyTree], run: Mapping[str, Any]) -> ocp.args.Composite:
    about = {
        "trees": {
            name: {"structure": _structure(tree), "sums": _sums(tree)}
            for name, tree in trees.items()
        },
        "run": dict(run),
    }
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    return ocp.args.Composite(about=ocp.args.JsonSave(about), **items)


def _restore(
    path: Path, read: Callable[[ocp.args.Composite], Any], like: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    failure: Exception | None = None
    try:
        about = read(ocp.args.Composite(about=ocp.args.JsonRestore())).about
        for name, tree in like.items():
            saved, asked = about["trees"].get(name, {}).get("structure"), _structure(tree)
            if saved != asked:
                raise AnotherTreeError(
                    f"{path} holds another {name} than asked for:\n{_difference(saved or 'none', asked)}"
                )
        items = {
            name: ocp.args.StandardRestore(jax.tree.map(_template, tree))
            for name, tree in like.items()
        }
        restored = read(ocp.args.Composite(**items))
        trees = {name: restored[name] for name in like}
    except AnotherTreeError:  # on all hosts alike
        raise
    except Exception as error:
        failure = error
    if not _all_hosts(
        failure is None
    ):  # before the sums over devices, in which all hosts must take part
        raise failure or OSError("another host cannot read it")
    for name, tree in trees.items():
        paths = [
            jax.tree_util.keystr(keys) for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
        ]
        sums = zip(paths, about["trees"][name]["sums"], _sums(tree), strict=True)
        changed = [array for array, saved, now in sums if saved != now]
        if changed:
            raise ValueError(
                f"{path} is damaged: the bytes of {', '.join(changed)} are not those that were saved"
            )
    return trees, about["run"]


def _template(leaf: Any) -> Any:
    """What Orbax is to restore: numpy as it is, arrays with the sharding they have here."""
    return leaf if isinstance(leaf, np.ndarray) else ocp.utils.to_shape_dtype_struct(leaf)


def _all_hosts(succeeded: bool) -> bool:
    return (
        bool(np.all(multihost_utils.process_allgather(np.array(succeeded))))
        if jax.process_count() > 1
        else succeeded
    )


def _structure(tree: PyTree) -> str:
    """The tree's structure in words, its constraints and shapes among them."""
    return f"{jax.tree.structure(tree)} of shapes {[leaf.shape for leaf in jax.tree.leaves(tree)]}"


def _difference(saved: str, asked: str) -> str:
    """Where two long descriptions part."""
    same = next(
        (i for i, (a, b) in enumerate(zip(saved, asked, strict=False)) if a != b),
        min(len(saved), len(asked)),
    )
    start = max(same - 80, 0)
    return (
        f"  saved: ...{saved[start : start + 300]}...\n  asked: ...{asked[start : start + 300]}..."
    )


def _sums(tree: PyTree) -> list[int]:
    """A check sum an array, the same however the array is laid out over devices: integers are added, each times an odd number."""
    return [int(value) for value in jax.device_get(_sums_of_bits(jax.tree.leaves(tree)))]


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_bits(leaf) for leaf in leaves]


def _sum_of_bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(
        array, jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    ).astype(jnp.uint32)
    # Odd factors are invertible modulo 2**32: one changed element always shows, two that changed
    # places nearly always.
    weight = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        weight = weight * np.uint32(2654435761) + jax.lax.broadcasted_iota(
            jnp.uint32, bits.shape, axis
        )
    return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)
