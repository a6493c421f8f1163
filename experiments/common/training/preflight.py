"""Checks before a run: are the data, the weights and the memory there?"""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from common.input.batch import UNREADABLE
from common.training.distillation import Teacher
from common.training.setup import Evaluate
from common.training.step import TrainState, TrainStep

_GIB = 2**30
# A program that needs more of a device than this fraction is likely to fail from fragmentation.
_USABLE = 0.95
_IMAGES = 1000  # to evaluate on


def preflight(
    train_step: Any,
    state: TrainState,
    batches: Iterator[Any],
    evaluate: Evaluate,
    teacher: tuple[Teacher, ...] = (),
) -> tuple[Any, TrainStep, str]:
    """Reads a batch, compiles the step, checks that it fits, and evaluates the initial weights.

    Args:
      train_step: of `make_train_step`.
      state: of the first step.
      batches: to train on; one is taken.
      evaluate: of `make_evaluation`.
      teacher: of `read_teacher`.

    Returns:
      The batch, the compiled step, and a line for the user.

    Raises:
      MemoryError: if the step does not fit the device.
    """
    started = time.perf_counter()
    batch = next(batches)
    unreadable = int(jnp.sum(batch["label"] == UNREADABLE))
    data = f"a batch in {time.perf_counter() - started:.1f} s, {unreadable} of it unreadable"
    started = time.perf_counter()
    compiled = train_step.lower(state, batch, *teacher).compile()
    memory = check_memory(memory_needed(compiled), available_memory())
    memory = f"{memory}, compiled in {time.perf_counter() - started:.0f} s"
    found = evaluate(state.params, state.batch_stats, _IMAGES)
    accuracy = f"top-1 {found['top1']:.2%} on {found['images']:.0f} validation images"
    line = f"{data}; {memory}; {accuracy}, {found['unreadable']:.0f} unreadable"
    return batch, compiled, line


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes per device that a compiled step needs at its peak, arguments included."""
    stats: Any = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )


def available_memory() -> int:
    """Returns the bytes of a device that a program may use; for a CPU, a share of free memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().available // jax.local_device_count()


def check_memory(needed: int, available: int) -> str:
    """Returns a line for the user; raises MemoryError if the step does not fit."""
    line = f"the step needs {needed / _GIB:.2f} of {available / _GIB:.2f} GiB per device"
    if needed > _USABLE * available:
        raise MemoryError(
            f"{line}: lower --config.batch_size, or share the parameters among devices with "
            "--config.fsdp"
        )
    return line
