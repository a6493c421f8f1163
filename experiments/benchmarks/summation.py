"""How exact the Lagrangian's sum over an epoch is: as the link adds it up, and added one by one.

    cd experiments && python -m benchmarks.summation

Losses that scatter about 2.3, in float32, against exact arithmetic. Nothing is timed. Writes
`results/summation.json` and `.md`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from benchmarks import timing
from common.report.tables import format_table

import cbp_jax

EPOCHS = 5  # of each length

_LONGEST = flags.DEFINE_integer("longest", 10**6, "Steps of the longest epoch.")


def errors(steps: int, seed: int) -> tuple[float, float]:
    """Returns the relative errors of the link's sum, and of the plain one."""
    noise = np.random.default_rng(seed).normal(size=steps)
    values = jnp.asarray(2.3 + 0.1 * noise, jnp.float32)
    params = {"w": jnp.array([[1.0, -2.0]])}
    link = cbp_jax.cbp("binary", steps_per_epoch=steps + 1, multiplier_learning_rate=0.0)

    @jax.jit
    def epoch(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        def step(carry: Any, value: jax.Array) -> tuple[Any, None]:
            state, total = carry
            return (link.update(params, state, params, value=value)[1], total + value), None

        (state, total), _ = jax.lax.scan(step, (link.init(params), jnp.float32(0)), values)
        return state.lagrangian_sum, total

    exact = math.fsum(map(float, values))
    ours, plain = (abs(float(total) / exact - 1) for total in epoch(values))
    return ours, plain


def measure(longest: int) -> list[dict[str, Any]]:
    """Returns the largest errors among the epochs of 1,000 steps, and so on to the longest."""
    rows = []
    for exponent in range(3, round(math.log10(longest)) + 1):
        found = [errors(10**exponent, seed) for seed in range(EPOCHS)]
        ours, plain = (max(values) for values in zip(*found, strict=True))
        rows.append({"steps": 10**exponent, "ours": ours, "plain": plain})
    return rows


def as_markdown(results: Mapping[str, Any]) -> str:
    """The page: one row per length of the epoch."""
    cells = [
        [f"{row['steps']:,}", f"{row['ours']:.1e}", f"{row['plain']:.1e}"]
        for row in results["rows"]
    ]
    table = format_table(("steps", "cbp", "added one by one"), cells)
    return (
        "# The Lagrangian's sum over an epoch\n"
        "`cd experiments && python -m benchmarks.summation`\n\n"
        f"Relative error in float32, the largest of {EPOCHS} epochs; {timing.described(results)}.\n"
        f"\n{table}\n"
    )


def main(argv: Sequence[str]) -> None:
    del argv
    results = timing.environment() | {"rows": measure(_LONGEST.value)}
    timing.write("summation", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
