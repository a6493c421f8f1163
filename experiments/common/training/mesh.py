"""The devices as a mesh over (`data`, `fsdp`), and the layout of a training state on it.

A batch is split over both axes. Parameters, and whatever has their shape (momenta, multipliers and
their moments), are split over `fsdp`; everything else is on every device. One device, several
devices and several hosts run the same code.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from common.config import ConfigError

PyTree = Any
_MIN_SHARDED = 2**16  # elements; gathering smaller arrays costs more than replicating them


def make_mesh(fsdp: int = 1) -> Mesh:
    """Makes a mesh of all hosts' devices, `fsdp` of which share one copy of the parameters.

    Raises:
      ConfigError: if the number of devices is not a multiple of `fsdp`.
    """
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise ConfigError(
            f"fsdp={fsdp} does not divide the {devices} devices: give a divisor of {devices}"
        )
    return jax.make_mesh(
        (devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits the first axis over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Keeps the whole array on every device."""
    return NamedSharding(mesh, P())


def state_shardings(mesh: Mesh, state: PyTree, params: PyTree) -> PyTree:
    """Returns the sharding of each array of a state.

    Args:
      mesh: of `make_mesh`.
      state: a tree of arrays or shapes, such as a `TrainState`.
      params: the parameters; an array of the state belongs to one if its path ends in the
        parameter's and the shapes are equal.

    Returns:
      A tree of `NamedSharding`, structured as the state.
    """
    of_params = {path: leaf.shape for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        belongs = any(of_params.get(path[start:]) == leaf.shape for start in range(len(path)))
        return NamedSharding(mesh, _spec(leaf.shape, mesh.shape["fsdp"]) if belongs else P())

    return jax.tree_util.tree_map_with_path(sharding, state)


def _spec(shape: tuple[int, ...], fsdp: int) -> P:
    """Splits the longest axis that `fsdp` divides, of equals the last; no axis of a small array."""
    axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
    if fsdp == 1 or not axes or math.prod(shape) < _MIN_SHARDED:
        return P()
    longest = max(axes, key=lambda axis: (shape[axis], axis))
    return P(*[None] * longest, "fsdp")


def put_state(state: PyTree, shardings: PyTree) -> PyTree:
    """Places a state that every host computed alike; copies arrays, so that they can be donated."""

    def put(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        host = np.array(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, state, shardings)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Assembles the global batch from every host's part."""
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
