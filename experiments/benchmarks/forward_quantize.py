"""The time of `quantize` on the parameters of ResNet-50, relative to that of negating them.

    cd experiments && python -m benchmarks.forward_quantize
    cd experiments && python -m benchmarks.forward_quantize --authors=CLONE  # needs torch

CLONE is one of dooseokjeong/CBP. Writes `results/forward_quantize.json` and `.md`.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags
from benchmarks import authors, timing, weights
from common.report.tables import format_table

import cbp_jax

COPY = "copy"
CONSTRAINTS = (
    *(cbp_jax.binary(), cbp_jax.ternary(), cbp_jax.one_bit_shift(), cbp_jax.two_bit_shift()),
    *(cbp_jax.shift(6), cbp_jax.uniform(4), cbp_jax.uniform(8)),
)

_AUTHORS = flags.DEFINE_string("authors", "", "A clone of the authors' repository.")
_CALLS = flags.DEFINE_integer("calls", 2, "Calls timed together; give more for fast devices.")
_TURNS = flags.DEFINE_integer("turns", 15, "Turns of each candidate.")


def measure() -> dict[str, Any]:
    """Measures milliseconds of each candidate, and its time relative to a copy."""
    shapes, mask = weights.resnet50()
    params = weights.random(shapes, seed=0)

    def candidate(function: Any, *args: Any) -> Any:
        compiled = jax.jit(function).lower(*args).compile()

        def run() -> Any:
            for _ in range(_CALLS.value):
                result = compiled(*args)  # frees the one before
            return result

        return run

    # A copy with the sign changed: XLA makes a plain one on a single core.
    candidates = {COPY: candidate(lambda tree: jax.tree.map(jnp.negative, tree), params)}
    for constraint in CONSTRAINTS:
        state = cbp_jax.cbp(constraint, mask=mask).init(params)
        candidates[constraint.name] = candidate(cbp_jax.quantize, params, state)
    if _AUTHORS.value:
        names = [constraint.name for constraint in CONSTRAINTS[:4]]
        for name, run in authors.quantizers(_AUTHORS.value, params, mask(shapes), names).items():
            candidates[name] = lambda run=run: [run() for _ in range(_CALLS.value)]
    seconds = timing.take_turns(candidates, _TURNS.value)
    rows = {
        name: {
            "milliseconds": 1000 * statistics.median(times) / _CALLS.value,
            "over_copy": timing.ratio(seconds, name, COPY),
        }
        for name, times in seconds.items()
    }
    return timing.environment() | {"turns": _TURNS.value, "calls": _CALLS.value, "candidates": rows}


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    rows = [
        (name, f"{row['milliseconds']:.2f}", f"{row['over_copy']:.2f}")
        for name, row in results["candidates"].items()
    ]
    return (
        "# The forward weights of ResNet-50\n"
        f"`cbp_jax.quantize` on 25.6 million parameters, {timing.described(results)}; medians of "
        f"{results['turns']} turns of {results['calls']} calls. By "
        "`python -m benchmarks.forward_quantize`.\n\n"
        f"{format_table(('constraint', 'ms', 'time over a copy'), rows)}\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    results = measure()
    timing.write(f"forward_quantize{timing.suffix()}", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
