"""Writes this folder's `README.md` from the results, and the table of aims for docs/costs.md."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from common.report.tables import format_table

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PLAIN = "SGD with momentum"
_DEFAULT, _LIGHT = "Adam, float32", "capped, bfloat16"  # settings of multiplier_state
# In the order of the page; `timing.suffix` gives the endings of results from an accelerator.
_PAGES = (
    *("optimizer_step", "optimizer_step_gpu", "optimizer_step_tpu"),
    *("forward_quantize", "forward_quantize_gpu", "forward_quantize_tpu"),
    *("train_step_resnet20", "train_step_resnet50"),
    *("scaling", "scaling_gpu", "scaling_tpu"),
    *("compiled", "multiplier_state_digits", "multiplier_state_fashion_mnist"),
)
_NOT_MEASURED = "not measured"

_INTRODUCTION = """
# How fast, and how much memory
[docs/costs.md](../../docs/costs.md) sets aims beside what was measured, and describes the light
setting of the multipliers. This page has every measurement. It is written by

```sh
cd experiments && TFDS_DATA_DIR=DIR python -m benchmarks --authors=CLONE
```

`CLONE` is a clone of the authors' repository, dooseokjeong/CBP, and optional; `--only=` rewrites
the page from the results that are there. Times are ratios within one run: candidates take turns,
and medians over the turns count. The same command measures an accelerator where there is one; what
XLA compiles for a GPU and a TPU is known without.

## Above the floor, and why
- **The optimizer's step.** For each weight, plain SGD with momentum reads and writes 5 words and
  CBP 6, so 1.2 times plain is the floor. XLA's code for a GPU moves little more ("words" under
  "What XLA makes of the optimizer's step" below). On a CPU it has one loop for the momentum and
  another for the weights, so plain moves 6 words and CBP 8; the rest is arithmetic. `cbp_sgd` also
  decays, clips and bounds the weights.
- **The Lagrangian's sum on a CPU** reads weights and multipliers once more, because XLA's CPU
  compiler cannot add up while it writes. It is computed in blocks whose sums stay in the cache. On
  a GPU and a TPU it is part of the one kernel of each tensor. Without a `value` there is no sum,
  and patience alone moves the window.
- **Multipliers in bfloat16 on a CPU** save memory, but no time where there is a sum: XLA's CPU
  compiler cannot slice 16-bit floats, and converts them to float32 first.
- **The loop that moves the multipliers** runs once every few epochs and not in the steps between,
  and copies nothing. It is a second set of loops, so the step takes longer to compile.
- **On a GPU** the step launches a dozen kernels more than plain SGD, for scalars, the sum of the
  rows and that loop. What they cost is not measured.
"""

_OTHERS = """
## Other benchmarks
Deployment and reading data, each with its own command:
[packed weights in JAX](results/inference_memory.md), [ONNX Runtime](results/onnx_runtime.md),
[decoders of photos](results/decoders.md),
[Llamas in llama.cpp](../../docs/llama.md#size-and-speed).
"""


def _read(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _range(values: list[float]) -> str:
    if not values:
        return _NOT_MEASURED
    low, high = min(values), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _step(name: str, wanted: Callable[[str], bool]) -> str:
    results = _read(name)
    if results is None:
        return _NOT_MEASURED
    return _range(
        [
            row["over_plain"]
            for key, row in results["candidates"].items()
            if "state" in row and wanted(key)
        ]
    )


def _sum_alone() -> str:
    results = _read("optimizer_step")
    if results is None:
        return _NOT_MEASURED
    rows = {
        key: row["over_plain"]
        for key, row in results["candidates"].items()
        if key.startswith("chain") and "light" not in key
    }
    return _range(
        [
            rows[key.removesuffix(", without the sum")] - over
            for key, over in rows.items()
            if key.endswith("sum")
        ]
    )


def _compile(wanted: Callable[[str], bool]) -> str:
    results = _read("optimizer_step")
    if results is None:
        return _NOT_MEASURED
    rows = results["candidates"]
    ours = _range([row["compile_seconds"] for key, row in rows.items() if wanted(key)])
    return f"{ours} (plain SGD {rows[PLAIN]['compile_seconds']:.2f})"


def _copies(wanted: Callable[[str], bool]) -> str:
    results = _read("optimizer_step")
    if results is None:
        return _NOT_MEASURED
    rows, plain = results["candidates"], results["candidates"][PLAIN]["state"]
    return _range(
        [
            (row["state"] - plain) / (4 * results["constrained"])
            for key, row in rows.items()
            if wanted(key)
        ]
    )


def _quantize(name: str) -> str:
    results = _read(name)
    if results is None:
        return _NOT_MEASURED
    paper = ("binary", "ternary", "one_bit_shift", "two_bit_shift")
    return _range([results["candidates"][constraint]["over_copy"] for constraint in paper])


def _train(network: str) -> str:
    results = _read(f"train_step_{network}")
    if results is None:
        return _NOT_MEASURED
    return _range(
        [over for method, over in results["time_over_plain"].items() if method != "plain"]
    )


def _accuracy(experiment: str) -> str:
    """By how many points the light setting beats the default, over constraints and seeds."""
    results = _read(f"multiplier_state_{experiment}")
    if results is None:
        return _NOT_MEASURED
    top1: dict[str, list[float]] = {}
    for run in results["runs"]:
        top1.setdefault(run["setting"], []).append(100 * run["top1"])
    if not {_DEFAULT, _LIGHT} <= top1.keys():
        return _NOT_MEASURED
    default, light = (sum(top1[setting]) / len(top1[setting]) for setting in (_DEFAULT, _LIGHT))
    return f"{light - default:+.2f} points"


def aims() -> str:
    """The table of what was aimed at and what was measured, for docs/costs.md."""

    def summed(key: str) -> bool:
        return (
            key.startswith(("chain", "cbp_sgd")) and not key.endswith("sum") and "light" not in key
        )

    def unsummed(key: str) -> bool:
        return key.endswith("without the sum") and "light" not in key

    rows = [
        (
            "optimizer step over plain SGD, CPU, without the sum",
            "1.8",
            _step("optimizer_step", unsummed),
        ),
        ("the same, with the sum", "", _step("optimizer_step", summed)),
        ("the sum alone", "", _sum_alone()),
        ("seconds to compile the step with the sum, CPU", "", _compile(summed)),
        ("optimizer step over plain SGD, GPU", "1.3", _step("optimizer_step_gpu", summed)),
        ("`quantize` over a copy of the weights, CPU", "1", _quantize("forward_quantize")),
        ("the same, GPU", "1", _quantize("forward_quantize_gpu")),
        ("training step over plain, ResNet-20, CPU", "", _train("resnet20")),
        (
            "training step over plain, ResNet-50, batch 256, bfloat16, accelerator",
            "1.02",
            _train("resnet50"),
        ),
        ("copies of the constrained weights in the state, default", "3.0", _copies(summed)),
        (
            "the same, light setting, float32 and bfloat16",
            "1.0",
            _copies(lambda key: "light" in key),
        ),
        (
            "accuracy of the light setting in bfloat16 over the default, digits",
            "0",
            _accuracy("digits"),
        ),
        ("the same, Fashion-MNIST", "0", _accuracy("fashion_mnist")),
    ]
    return format_table(("", "at most, or aim", "measured"), rows)


def write() -> None:
    """Writes the page; what was not measured is left out."""
    parts = [_INTRODUCTION.strip()]
    for name in _PAGES:
        path = RESULTS / f"{name}.md"
        if path.is_file():
            lines = path.read_text().strip().splitlines()
            parts.append("\n".join(f"#{line}" if line.startswith("#") else line for line in lines))
    parts.append(_OTHERS.strip())
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")
    print(f"written to {HERE / 'README.md'}; run update_pages.py for the table in docs/costs.md")
