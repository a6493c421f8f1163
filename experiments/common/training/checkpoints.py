"""Orbax checkpoints that record the tree they hold and check sums of it, and so detect damage."""

import functools
import itertools
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from common.config import ConfigError

PyTree = Any
# How often to list the checkpoints of a run that goes on, and removes them as they are read.
_LISTINGS = 10
_DTYPES = " and dtypes "


def save(path: Path, tree: PyTree) -> None:
    """Writes a tree to a folder, replacing it if it exists."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=_save_args({"tree": tree}, {}), force=True)


def restore(path: Path, like: PyTree) -> PyTree:
    """Reads a tree with the structure, shapes, dtypes and shardings of `like`.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if it is damaged or holds another tree; a CBP state under another constraint is
        one, although Orbax compares only arrays.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        read = functools.partial(checkpointer.restore, path.absolute())
        return _restore(path, lambda args: read(args=args), {"tree": like})[0]["tree"]


class AnotherTreeError(ConfigError):
    """A checkpoint is intact, but of another network, optimizer or constraint."""


def newest_step(folder: Path) -> int | None:
    """Returns the step of a run's newest checkpoint that was written to its end, if any."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=None)


class Checkpoints:
    """The newest few checkpoints of a run, written in the background.

    Args:
      folder: where they are; created if missing.
      keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 3):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self.folder = folder.absolute()
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, trees: Mapping[str, PyTree], run: Mapping[str, Any]) -> None:
        """Copies trees off the device and writes them in the background, and `run` as JSON.

        Does nothing if the step has a checkpoint.
        """
        if step not in self.steps():
            self._manager.save(step, args=_save_args(trees, run))

    def discard(self, steps: Iterable[int]) -> None:
        """Removes the checkpoints of some steps, once everything is written."""
        self.wait()
        for step in steps:
            self._manager.delete(step)

    def restore_newest(
        self, like: Mapping[str, PyTree], put_aside: bool = False
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        """Reads the newest intact checkpoint; skips damaged ones with a warning.

        Several hosts agree on one.

        Args:
          like: by name, trees of the structures, shapes, dtypes and shardings to read, or of numpy
            arrays to read as such; other trees of the checkpoint are not read.
          put_aside: once an older one was read, rename damaged ones to `damaged_<step>`, so that
            their steps can be saved again.

        Returns:
          Its step, its trees and `run`; None if there are no checkpoints.

        Raises:
          AnotherTreeError: if the newest intact checkpoint holds another tree than `like`.
          ValueError: if there are checkpoints, none of which can be read.
        """
        for _ in range(_LISTINGS):
            steps = self.steps()
            found = self._restore_newest_of(steps, like, put_aside)
            if found is not None or not steps:
                return found
            self._manager.reload()
            if self.steps() == steps:
                break
        raise ValueError(
            f"none of the checkpoints in {self.folder} can be read (steps {steps}): give another "
            "workdir to start afresh"
        )

    def _restore_newest_of(
        self, steps: list[int], like: Mapping[str, PyTree], put_aside: bool
    ) -> tuple[int, dict[str, PyTree], dict[str, Any]] | None:
        damaged = []
        for step in reversed(steps):
            try:
                read = functools.partial(self._restore_step, step)
                trees, run = _restore(self.folder / str(step), read, like)
            except AnotherTreeError:
                raise
            except Exception as error:  # Orbax and TensorStore raise anything
                if not (self.folder / str(step)).exists():  # its run goes on, and has removed it
                    continue
                reason = str(error).strip().split("\n")[0][:200]
                warnings.warn(
                    f"the checkpoint of step {step} in {self.folder} cannot be read "
                    f"({type(error).__name__}: {reason}): trying the one before",
                    stacklevel=3,
                )
                damaged.append(step)
            else:
                if put_aside and damaged:
                    self.put_aside(damaged)
                return step, trees, run
        return None

    def _restore_step(self, step: int, args: ocp.args.Composite) -> Any:
        return self._manager.restore(step, args=args)

    def put_aside(self, steps: Iterable[int]) -> None:
        """Renames checkpoints to `damaged_<step>`, so that their steps can be saved again."""
        if jax.process_index() == 0:
            for step in steps:
                later = (f"damaged_{step}_{count}" for count in itertools.count(2))
                names = itertools.chain([f"damaged_{step}"], later)
                free = next(name for name in names if not (self.folder / name).exists())
                (self.folder / str(step)).rename(self.folder / free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoint")
        self._manager.reload()

    def newest(self) -> int | None:
        """Returns the step of the newest checkpoint, if any."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, the newest last."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Waits until everything is written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until everything is written, then closes the manager."""
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
    text = json.dumps(about)
    sealed = {"text": text, "crc32": zlib.crc32(text.encode())}
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    return ocp.args.Composite(about=ocp.args.JsonSave(sealed), **items)


def _restore(
    path: Path, read: Callable[[ocp.args.Composite], Any], like: Mapping[str, PyTree]
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    failure: Exception | None = None
    try:
        about = _unsealed(read(ocp.args.Composite(about=ocp.args.JsonRestore())).about)
        for name, tree in like.items():
            saved, asked = about["trees"].get(name, {}).get("structure"), _structure(tree)
            # Checkpoints of earlier versions do not name dtypes.
            if saved not in (asked, asked.partition(_DTYPES)[0]):
                difference = _difference(saved or "none", asked)
                raise AnotherTreeError(f"{path} holds another {name} than asked for:\n{difference}")
        templates = jax.tree.map(_template, dict(like))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in templates.items()}
        restored = read(ocp.args.Composite(**items))
        trees = {name: restored[name] for name in like}
    except AnotherTreeError:  # on all hosts alike
        raise
    except Exception as error:
        failure = error
    # Before the sums over devices, in which all hosts must take part.
    if not _all_hosts(failure is None):
        raise failure or OSError("another host cannot read it")
    for name, tree in trees.items():
        paths = [jax.tree_util.keystr(keys) for keys, _ in jax.tree.leaves_with_path(tree)]
        sums = zip(paths, about["trees"][name]["sums"], _sums(tree), strict=True)
        if changed := ", ".join(array for array, saved, now in sums if saved != now):
            raise ValueError(
                f"{path} is damaged: the bytes of {changed} are not those that were saved"
            )
    return trees, about["run"]


def _unsealed(sealed: Any) -> dict[str, Any]:
    """What a checkpoint says about itself; raises an error if that is damaged."""
    if "trees" in sealed:  # from before it was sealed
        return sealed
    text = sealed["text"]
    if zlib.crc32(text.encode()) != sealed["crc32"]:
        raise ValueError("what it says about itself has changed")
    return json.loads(text)


def _template(leaf: Any) -> Any:
    """Asks Orbax for numpy arrays as such, and for others with the sharding they have here."""
    return leaf if isinstance(leaf, np.ndarray) else ocp.utils.to_shape_dtype_struct(leaf)


def _all_hosts(succeeded: bool) -> bool:
    if jax.process_count() == 1:
        return succeeded
    return bool(np.all(multihost_utils.process_allgather(np.array(succeeded))))


def _structure(tree: PyTree) -> str:
    """Describes a tree's structure, with its constraints, shapes and dtypes."""
    leaves = jax.tree.leaves(tree)
    shapes, dtypes = [leaf.shape for leaf in leaves], [str(leaf.dtype) for leaf in leaves]
    return f"{jax.tree.structure(tree)} of shapes {shapes}{_DTYPES}{dtypes}"


def _difference(saved: str, asked: str) -> str:
    """Shows two long descriptions from where they begin to differ."""
    pairs = enumerate(zip(saved, asked, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(saved), len(asked)))
    part = slice(max(same - 80, 0), max(same - 80, 0) + 300)
    return f"  saved: ...{saved[part]}...\n  asked: ...{asked[part]}..."


def _sums(tree: PyTree) -> list[int]:
    """Computes one check sum per array, which does not depend on the layout over devices.

    It adds up the array's bits as integers, each times an odd number.
    """
    return [int(value) for value in jax.device_get(_sums_of_bits(jax.tree.leaves(tree)))]


@jax.jit
def _sums_of_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    return [_sum_of_bits(leaf) for leaf in leaves]


def _sum_of_bits(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    words = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
    bits = jax.lax.bitcast_convert_type(array, words).astype(jnp.uint32)
    # Odd factors are invertible modulo 2**32, so one changed element always shows, and two swapped
    # ones nearly always.
    weight = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        weight = weight * np.uint32(2654435761) + index
    return jnp.sum(bits * (2 * weight + 1), dtype=jnp.uint32)
