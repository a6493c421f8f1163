"""The cost of CBP in the optimizer's step by the number of weights, and by the number of devices.

    cd experiments && python -m benchmarks.scaling

Times SGD with momentum, plain and after ternary CBP, on square matrices: from a million weights to
as many as fit into memory, in factors of four; then 16 million on 1, 2, 4 and 8 devices, replicated
or sharded. On a CPU the devices are virtual and share its cores, so only the ratio is meaningful.
Writes `results/scaling.json` and `.md`.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from absl import app, flags
from benchmarks import timing, weights
from benchmarks.steps import Step
from common.report.tables import format_table
from common.training import preflight
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import cbp_jax

PLAIN, CBP, WITHOUT_SUM = "SGD with momentum", "CBP", "CBP, without the sum"
_SMALLEST = 2**20
_SHARED = 2**24
# Float32 numbers per weight: weights and momentum of three steps, multipliers and two moments of
# two, the gradients, and the initial weights.
_WORDS = 3 * 2 + 2 * 3 + 2

_LARGEST = flags.DEFINE_integer("largest", 0, "Most weights; 0: as many as fit into free memory.")
_STEPS = flags.DEFINE_integer("steps", 2, "Steps timed together; give more for fast devices.")
_TURNS = flags.DEFINE_integer("turns", 9, "Turns of each candidate.")


def compare(shapes: Any, sharding: Any = None) -> dict[str, float]:
    """Measures plain SGD and CBP: milliseconds, and time relative to plain."""
    params, grads = (weights.random(shapes, seed) for seed in (0, 1))
    if sharding is not None:
        params, grads = jax.device_put((params, grads), sharding)
    sgd = optax.sgd(1e-3, momentum=0.9)
    chain = optax.chain(cbp_jax.cbp("ternary"), sgd)
    given = {PLAIN: (sgd, False), CBP: (chain, True), WITHOUT_SUM: (chain, False)}
    candidates = {
        name: Step(optimizer, params, grads, value, _STEPS.value)
        for name, (optimizer, value) in given.items()
    }
    del params
    seconds = timing.take_turns(candidates, _TURNS.value)
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    return {
        "milliseconds": 1000 * statistics.median(seconds[PLAIN]) / _STEPS.value,
        "cbp_milliseconds": 1000 * statistics.median(seconds[CBP]) / _STEPS.value,
        "over_plain": timing.ratio(seconds, CBP, PLAIN),
        "without_sum_over_plain": timing.ratio(seconds, WITHOUT_SUM, PLAIN),
        "state_copies": candidates[CBP].state_bytes / (4 * count) - 1,
    }


def measure() -> dict[str, Any]:
    """Measures by size on one device, then by number of devices in both layouts."""
    # Virtual devices share one memory.
    sharing = jax.local_device_count() if jax.devices()[0].platform == "cpu" else 1
    most = _LARGEST.value or sharing * preflight.available_memory() // (4 * _WORDS)
    sizes = {}
    count = _SMALLEST
    while count <= most:
        sizes[count] = compare(weights.dense(count))
        count *= 4
    devices = []
    for number in (1, 2, 4, 8):
        if number > jax.device_count():
            break
        mesh = Mesh(np.array(jax.devices()[:number]), ("devices",))
        for layout, spec in {"each has all": P(), "each has its share": P("devices")}.items():
            row = compare(weights.dense(_SHARED), NamedSharding(mesh, spec))
            devices.append({"devices": number, "layout": layout} | row)
    return timing.environment() | {
        "turns": _TURNS.value,
        "steps": _STEPS.value,
        "sizes": {str(count): row for count, row in sizes.items()},
        "by_devices": devices,
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""

    def cells(row: Mapping[str, float]) -> tuple[str, ...]:
        times = (f"{row['milliseconds']:.2f}", f"{row['cbp_milliseconds']:.2f}")
        return (*times, f"{row['over_plain']:.2f}", f"{row['without_sum_over_plain']:.2f}")

    header = ("plain, ms", "CBP, ms", "CBP over plain", "without the sum")
    sizes = [(f"{int(count):,}", *cells(row)) for count, row in results["sizes"].items()]
    devices = [(str(row["devices"]), row["layout"], *cells(row)) for row in results["by_devices"]]
    virtual = ""
    if results["platform"] == "cpu":
        virtual = " These are virtual and share a CPU's cores: only the ratio is meaningful."
    return (
        "# The optimizer's step by the number of weights and of devices\n"
        "SGD with momentum, plain and after ternary CBP, all weights constrained, "
        f"{timing.described(results)}; medians of {results['turns']} turns of {results['steps']} "
        "steps. By `python -m benchmarks.scaling`.\n\n"
        f"{format_table(('weights', *header), sizes)}\n\n"
        f"{_SHARED:,} weights by devices.{virtual}\n\n"
        f"{format_table(('devices', 'weights', *header), devices)}\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    jax.config.update("jax_num_cpu_devices", 8)
    results = measure()
    timing.write(f"scaling{timing.suffix()}", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
