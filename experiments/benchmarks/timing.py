"""What the benchmarks share: candidates that take turns, and results as JSON and as a page.

Machines are shared and noisy, so a time means something beside another of the same run only. In
every turn each candidate runs once; the ratio of two candidates is the median over turns of their
ratio in a turn, so that load which comes and goes cancels.
"""

import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def take_turns(
    candidates: Mapping[str, Callable[[], object]], turns: int
) -> dict[str, list[float]]:
    """Seconds of each candidate in each turn. A candidate does its work and returns what to wait for."""
    for candidate in candidates.values():
        jax.block_until_ready(candidate())  # warm
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            jax.block_until_ready(candidate())
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> float:
    """The median over turns of a candidate's time over that of another."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def environment() -> dict[str, Any]:
    """On what it was measured."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def described(results: Mapping[str, Any]) -> str:
    """The environment in words."""
    return f"on {results['device']}, jax {results['jax']}"


def suffix() -> str:
    """What the names of results end with: nothing on a CPU, else the platform, so that results of several stay side by side."""
    platform_name = jax.devices()[0].platform
    return "" if platform_name == "cpu" else f"_{platform_name}"


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def write(name: str, results: Mapping[str, Any], page: str) -> None:
    """Leaves `results/NAME.json` and `.md`, and prints the page."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (RESULTS / f"{name}.md").write_text(page)
    print(page)
