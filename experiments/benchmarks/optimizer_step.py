"""The optimizer's step on ResNet-50: SGD with momentum, plain and after CBP under each constraint.

    cd experiments && python -m benchmarks.optimizer_step
    cd experiments && python -m benchmarks.optimizer_step --authors=CLONE  # needs torch

A step is `optimizer.update` and `optax.apply_updates`, jitted, with donated parameters and state.
Each is timed with and without the loss, which the Lagrangian's sum needs. Memory and compile time
are those of the compiled step. CLONE is one of the authors' code, dooseokjeong/CBP: the same
tensors go through its constraint function and its optimizer, as its training loop calls them, in
turns with ours. Writes `results/optimizer_step.json` and `.md`.
"""

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import optax
from absl import app, flags
from benchmarks import authors, timing, weights
from benchmarks.steps import Step
from common.config import base_config
from common.report.tables import format_table
from common.training.optimizers import multiplier_options

import cbp_jax

PLAIN = "SGD with momentum"
CONSTRAINTS = ("binary", "ternary", "one_bit_shift", "two_bit_shift")

_AUTHORS = flags.DEFINE_string("authors", "", "A clone of the authors' repository.")
_STEPS = flags.DEFINE_integer("steps", 2, "Steps timed together; give more for fast devices.")
_TURNS = flags.DEFINE_integer("turns", 15, "Turns of each candidate.")


def optimizers(mask: Any) -> Iterator[tuple[str, optax.GradientTransformation, bool]]:
    """Yields names, optimizers, and whether each is given the loss."""
    sgd = optax.sgd(1e-3, momentum=0.9)
    yield PLAIN, sgd, False
    for constraint in CONSTRAINTS:
        chain = optax.chain(cbp_jax.cbp(constraint, mask=mask), sgd)
        recipe = cbp_jax.cbp_sgd(1e-3, constraint, mask=mask)
        for kind, optimizer in (("chain", chain), ("cbp_sgd", recipe)):
            yield f"{kind}, {constraint}", optimizer, True
            yield f"{kind}, {constraint}, without the sum", optimizer, False
    config = base_config("", "")
    for dtype in ("float32", "bfloat16"):
        config.multiplier_rule, config.multiplier_dtype = "capped", dtype
        light = optax.chain(cbp_jax.cbp("ternary", mask=mask, **multiplier_options(config)), sgd)
        yield f"chain, ternary, light, {dtype}", light, True
        yield f"chain, ternary, light, {dtype}, without the sum", light, False


def measure() -> dict[str, Any]:
    """Measures time, also relative to plain, state, peak memory and compile time of each step."""
    shapes, mask = weights.resnet50()
    grads = weights.random(shapes, seed=1)
    params = weights.random(shapes, seed=0)
    steps = {
        name: Step(optimizer, params, grads, with_value, _STEPS.value)
        for name, optimizer, with_value in optimizers(mask)
    }
    candidates: dict[str, Any] = dict(steps)
    theirs = {}
    if clone := _AUTHORS.value:
        theirs = authors.steps(clone, params, grads, mask(shapes), CONSTRAINTS, _STEPS.value)
    seconds = timing.take_turns(candidates | theirs, _TURNS.value)
    rows: dict[str, dict[str, float]] = {}
    for name, times in seconds.items():
        reference = authors.PLAIN if name in theirs else PLAIN
        rows[name] = {
            "milliseconds": 1000 * statistics.median(times) / _STEPS.value,
            "over_plain": timing.ratio(seconds, name, reference),
            "over_ours": timing.ratio(seconds, name, PLAIN),
        }
        if name in steps:
            step = steps[name]
            rows[name] |= {
                "state": step.state_bytes,
                "peak": step.peak_bytes,
                "compile_seconds": step.compile_seconds,
            }
    sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
    pairs = zip(sizes, jax.tree.leaves(mask(shapes)), strict=True)
    return timing.environment() | {
        "weights": sum(sizes),
        "constrained": sum(size for size, flag in pairs if flag),
        "steps": _STEPS.value,
        "turns": _TURNS.value,
        "candidates": rows,
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    plain = results["candidates"][PLAIN]
    ours, theirs = [], []
    for name, row in results["candidates"].items():
        times = [row["milliseconds"], row["over_plain"]]
        if "state" in row:
            copies = (row["state"] - plain["state"]) / (4 * results["constrained"])
            cells = [f"{value:.2f}" for value in (*times, copies)]
            peak, seconds = f"{row['peak'] / 2**20:.0f}", f"{row['compile_seconds']:.1f}"
            ours.append([name, *cells, peak, seconds])
        else:
            theirs.append([name, *(f"{value:.1f}" for value in (*times, row["over_ours"]))])
    header = ("optimizer", "ms", "time over plain", "copies", "peak, MiB", "compile, s")
    parts = [
        "# The optimizer's step on ResNet-50\n"
        f"{results['weights']:,} parameters, {results['constrained']:,} of them constrained, "
        f"{timing.described(results)}; medians of {results['turns']} turns of {results['steps']} "
        "steps. Copies: the state beyond plain's, relative to the constrained weights in float32. "
        "Peak: arguments, results and temporary memory of the compiled step, including gradients. "
        "By `python -m benchmarks.optimizer_step`.",
        format_table(header, ours),
    ]
    if theirs:
        parts.append(
            "The authors' PyTorch code, in turns with the above. Their step clips, decays and "
            "clamps, as in their training loop."
        )
        columns = ("the authors' code", "ms", "time over its own plain", "time over our plain")
        parts.append(format_table(columns, theirs))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    results = measure()
    timing.write(f"optimizer_step{timing.suffix()}", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
