"""Checks before a long run: does a step fit into the device's memory?"""

from typing import Any

import jax
import psutil

_GIB = 2**30
_USABLE = 0.95  # of a device's memory; fragmentation is likely to make more fail


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Returns the peak bytes per device of a compiled step, its arguments included."""
    stats: Any = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )


def available_memory() -> int:
    """Returns the bytes of a device that a program may use; on a CPU its share of free memory."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().available // jax.local_device_count()


def check_memory(needed: int, available: int) -> str:
    """Returns a line that compares the two.

    Raises:
      MemoryError: if the step does not fit; it says what to do.
    """
    there = f"{available / _GIB:.2f} GiB are there"
    line = f"the step needs {needed / _GIB:.2f} GiB on each device, {there}"
    if needed > _USABLE * available:
        raise MemoryError(
            f"{line}: lower --config.batch_size, or share the parameters among devices with "
            "--config.fsdp"
        )
    return line


memory_there = available_memory  # for training/run.py
