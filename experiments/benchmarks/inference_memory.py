"""Memory and time of inference from packed weights, expanded at load or unpacked at every call.

    cd experiments && python -m benchmarks.inference_memory

Memory is that of the compiled function (`memory_analysis()`): its arguments, which are the weights
and the input, and its temporary memory. Times are medians of calls that take turns. Writes
`results/inference_memory.json` and `.md`.
"""

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from benchmarks import timing
from common import models
from common.report.tables import format_table
from flax import nnx

import cbp_jax

PyTree = Any
EXPAND = "expand, float32"

_REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Calls of each candidate.")
_LAYERS = flags.DEFINE_integer("layers", 8, "Dense layers in the stack.")
_WIDTH = flags.DEFINE_integer("width", 2048, "Width of each.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels each way, for ResNet-18.")


class Case(NamedTuple):
    """A network with ternary weights, and an input of batch 1."""

    packed: cbp_jax.Packed
    template: PyTree
    forward: Callable[[PyTree, jax.Array], jax.Array]
    x: jax.Array


def dense_stack() -> Case:
    """Square layers, one after another."""
    width, params = _WIDTH.value, {}
    for i, key in enumerate(jax.random.split(jax.random.key(0), _LAYERS.value)):
        params[f"layer{i}"] = jax.random.normal(key, (width, width)) / width**0.5

    def forward(params: PyTree, x: jax.Array) -> jax.Array:
        for i in range(_LAYERS.value):
            x = jnp.tanh(x @ params[f"layer{i}"].astype(x.dtype))
        return x

    packed = cbp_jax.pack(params, cbp_jax.cbp("ternary").init(params), round=True)
    return Case(packed, params, forward, jnp.ones((1, width)))


def resnet18() -> Case:
    """Random weights; the first and the last layer, and batch normalization, in float32."""
    model = models.create("resnet18", rngs=nnx.Rngs(0))
    model.eval()
    graphdef, params, batch_stats = models.split_model(model)
    optimizer = cbp_jax.cbp("ternary", mask=cbp_jax.select(include=model.constrained))
    tree = {**params, "batch_stats": batch_stats}

    def forward(tree: PyTree, x: jax.Array) -> jax.Array:
        weights = dict(tree)
        return nnx.merge(graphdef, weights, weights.pop("batch_stats"))(x)

    packed = cbp_jax.pack(tree, optimizer.init(params), round=True)
    return Case(packed, tree, forward, jnp.ones((1, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)))


def measure(case: Case, repetitions: int) -> dict[str, dict[str, float]]:
    """Measures MiB and milliseconds of each variant, and its time relative to `EXPAND`."""

    def plain(packed: cbp_jax.Packed, x: jax.Array) -> jax.Array:
        return case.forward(cbp_jax.unpack(packed, case.template), x)

    def predict(**options: Any) -> Any:
        return cbp_jax.make_predict(case.forward, case.packed, case.template, **options)

    functions = {
        EXPAND: predict(),
        "expand, bfloat16": predict(dtype=jnp.bfloat16),
        "packed": predict(weights="packed"),
        "packed, jax.jit without the flag": jax.tree_util.Partial(
            jax.jit(plain), jax.device_put(case.packed)
        ),
    }
    rows, candidates = {}, {}
    for name, function in functions.items():
        compiled = function.func.lower(*function.args, case.x).compile()
        candidates[name] = functools.partial(compiled, *function.args, case.x)
        memory = compiled.memory_analysis()
        rows[name] = {
            "arguments": memory.argument_size_in_bytes / 2**20,
            "temporary": memory.temp_size_in_bytes / 2**20,
        }
    seconds = timing.take_turns(candidates, repetitions)
    for name, times in seconds.items():
        rows[name]["milliseconds"] = 1000 * statistics.median(times)
        rows[name]["over"] = timing.ratio(seconds, name, EXPAND)
    return rows


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    header = ("weights", "arguments, MiB", "temporary, MiB", "together", "ms", "time over expand")
    parts = [
        "# Memory and time of inference from packed weights\n"
        f"Ternary weights, batch 1, {timing.described(results)}; medians of "
        f"{results['repetitions']} calls that take turns. By "
        "`python -m benchmarks.inference_memory`."
    ]
    for name, rows in results["cases"].items():
        cells = [
            (
                way,
                f"{row['arguments']:.1f}",
                f"{row['temporary']:.1f}",
                f"{row['arguments'] + row['temporary']:.1f}",
                f"{row['milliseconds']:.1f}",
                f"{row['over']:.2f}",
            )
            for way, row in rows.items()
        ]
        parts.append(f"## {name}\n{format_table(header, cells)}")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    repetitions, size = _REPETITIONS.value, _IMAGE_SIZE.value
    stack = f"{_LAYERS.value} dense layers of {_WIDTH.value} x {_WIDTH.value}"
    results = timing.environment() | {
        "repetitions": repetitions,
        "cases": {
            stack: measure(dense_stack(), repetitions),
            f"ResNet-18, {size} x {size} pixels": measure(resnet18(), repetitions),
        },
    }
    timing.write("inference_memory", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
