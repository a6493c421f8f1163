"""Times candidates in turns, and writes results as JSON and as a page.

Machines are shared and noisy, so times are comparable only within a run. Each candidate runs once
per turn, and the ratio of two candidates is the median over turns of their ratio in a turn, so that
changing load cancels.
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
    """Returns each candidate's seconds in each turn; a candidate returns what to wait for."""
    for candidate in candidates.values():
        jax.block_until_ready(candidate())  # warm-up
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            jax.block_until_ready(candidate())
            seconds[name].append(time.perf_counter() - started)
    return seconds


def ratio(seconds: Mapping[str, list[float]], name: str, reference: str) -> float:
    """Returns the median over turns of a candidate's time relative to the reference's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def environment() -> dict[str, Any]:
    """Returns the device and the versions of a measurement."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def described(results: Mapping[str, Any]) -> str:
    """Describes the environment of results."""
    return f"on {results['device']}, jax {results['jax']}"


def suffix() -> str:
    """Returns the ending of results' names: the platform, or nothing on a CPU."""
    platform_name = jax.devices()[0].platform
    return "" if platform_name == "cpu" else f"_{platform_name}"


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays, or array shapes, of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def write(name: str, results: Mapping[str, Any], page: str, folder: pathlib.Path = RESULTS) -> None:
    """Writes `NAME.json` and `NAME.md`, and prints the page."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (folder / f"{name}.md").write_text(page)
    print(page)
