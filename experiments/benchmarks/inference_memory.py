"""What running from packed weights saves in memory, and what it costs in time: expanded at load, or
unpacked at every call.

    cd experiments && python -m benchmarks.inference_memory

Memory is what the compiled function says (`memory_analysis()`): its arguments, which are the
weights and the input, and what it needs besides while it runs. Times are medians of calls that take
turns. Writes `results/inference_memory.json` and `.md`.
"""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from common import models
from common.report.tables import format_table
from flax import nnx

import cbp_jax

PyTree = Any
RESULTS = pathlib.Path(__file__).parent / "results"
EXPAND = "expand, float32"

_REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Calls of each candidate.")
_LAYERS = flags.DEFINE_integer("layers", 8, "Of the stack of dense layers.")
_WIDTH = flags.DEFINE_integer("width", 2048, "Of each of them.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels each way, for ResNet-18.")


class Case(NamedTuple):
    """A network at ternary weights, and an input of batch 1."""

    packed: cbp_jax.Packed
    template: PyTree
    forward: Callable[[PyTree, jax.Array], jax.Array]
    x: jax.Array


def dense_stack() -> Case:
    """Square layers, one after another."""
    keys = jax.random.split(jax.random.key(0), _LAYERS.value)
    width = _WIDTH.value
    params = {
        f"layer{i}": jax.random.normal(key, (width, width)) / width**0.5
        for i, key in enumerate(keys)
    }

    def forward(params: PyTree, x: jax.Array) -> jax.Array:
        for i in range(_LAYERS.value):
            x = jnp.tanh(x @ params[f"layer{i}"].astype(x.dtype))
        return x

    packed = cbp_jax.pack(params, cbp_jax.cbp("ternary").init(params), round=True)
    return Case(packed, params, forward, jnp.ones((1, width)))


def resnet18() -> Case:
    """With random weights; the first and the last layer, and batch normalization, in float32."""
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


def measure(case: Case) -> dict[str, dict[str, float]]:
    """MiB and milliseconds of each way; the time over that of weights expanded to float32."""

    def plain(packed: cbp_jax.Packed, x: jax.Array) -> jax.Array:
        return case.forward(cbp_jax.unpack(packed, case.template), x)

    def predict(**options: Any) -> Any:
        return cbp_jax.make_predict(case.forward, case.packed, case.template, **options)

    candidates = {
        EXPAND: predict(),
        "expand, bfloat16": predict(dtype=jnp.bfloat16),
        "packed": predict(weights="packed"),
        "packed, jax.jit without the flag": jax.tree_util.Partial(
            jax.jit(plain), jax.device_put(case.packed)
        ),
    }
    rows, compiled = {}, {}
    for name, function in candidates.items():
        compiled[name] = function.func.lower(*function.args, case.x).compile()
        memory = compiled[name].memory_analysis()
        rows[name] = {
            "arguments": memory.argument_size_in_bytes / 2**20,
            "temporary": memory.temp_size_in_bytes / 2**20,
        }
        compiled[name](*function.args, case.x)
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(_REPETITIONS.value):
        for name, function in candidates.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled[name](*function.args, case.x))
            seconds[name].append(time.perf_counter() - started)
    for name, times in seconds.items():
        rows[name]["milliseconds"] = 1000 * statistics.median(times)
        rows[name]["over"] = statistics.median(
            a / b for a, b in zip(times, seconds[EXPAND], strict=True)
        )
    return rows


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page."""
    header = ("weights", "arguments, MiB", "temporary, MiB", "together", "ms", "time over expand")
    parts = [
        "# Memory and time of inference from packed weights\n"
        f"Ternary weights, batch 1, on {results['device']}, jax {results['jax']}; medians of {results['repetitions']} calls that "
        "take turns. By `experiments/benchmarks/inference_memory.py`."
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
    results = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "repetitions": _REPETITIONS.value,
        "cases": {
            f"{_LAYERS.value} dense layers of {_WIDTH.value} x {_WIDTH.value}": measure(
                dense_stack()
            ),
            f"ResNet-18, {_IMAGE_SIZE.value} x {_IMAGE_SIZE.value} pixels": measure(resnet18()),
        },
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "inference_memory.json").write_text(
        json.dumps(results, indent=1, allow_nan=False) + "\n"
    )
    (RESULTS / "inference_memory.md").write_text(as_markdown(results))
    print(as_markdown(results))


if __name__ == "__main__":
    app.run(main)
