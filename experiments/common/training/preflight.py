"""What a minute tells before a run of days: are the data, the weights and the memory there?"""

from typing import Any

import jax
import psutil

_GIB = 2**30
# More than this share of a device is likely to fail from fragmentation.
_USABLE = 0.95


def memory_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes on each device that a compiled step needs at its peak, what it is given included."""
    stats: Any = compiled.memory_analysis()
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes
    )


def memory_there() -> int:
    """Bytes of a device that a program may use; on a CPU its share of the memory that is free."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return psutil.virtual_memory().available // jax.local_device_count()


def check_memory(needed: int, there: int) -> str:
    """A line for the user.

    Raises:
      MemoryError: if the step does not fit; it says what to do.
    """
    line = (
        f"the step needs {needed / _GIB:.2f} GiB on each device, {there / _GIB:.2f} GiB are there"
    )
    if needed > _USABLE * there:
        raise MemoryError(
            f"{line}: lower --config.batch_size, or share the parameters among devices with --config.fsdp"
        )
    return line
