"""Writes this folder's `README.md`: aims beside measurements, then every benchmark's own page."""

import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

from common.report.workdir import format_table

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
PLAIN = "SGD with momentum"
_DEFAULT, _LIGHT = "Adam, float32", "capped, bfloat16"  # settings of multiplier_state
# In the order of the page; with the endings of `timing.suffix` for accelerators.
_PAGES = (
    *("optimizer_step", "optimizer_step_gpu", "optimizer_step_tpu"),
    *("forward_quantize", "forward_quantize_gpu", "forward_quantize_tpu"),
    *("train_step_resnet20", "train_step_resnet50"),
    *("scaling", "scaling_gpu", "scaling_tpu"),
    *("compiled", "multiplier_state_digits", "multiplier_state_fashion_mnist"),
)
_NOT_MEASURED = "not measured"

_WHY = """
## What is above the floor, and why
- **The optimizer's step.** Plain SGD with momentum has to read and write 5 words per weight, CBP 6:
  the floor is 1.2 times plain, and what XLA makes for a GPU moves little more ("words" under "What
  XLA makes of the optimizer's step" below). On a CPU it makes one loop for the momentum and another
  for the weights, so plain moves 6 words and CBP 8; the rest is arithmetic. `cbp_sgd` does more
  than either: it decays, clips, and keeps weights in their box.
- **The Lagrangian's sum on a CPU** reads weights and multipliers once more, because XLA's CPU
  compiler cannot accumulate while it writes. It runs in blocks whose sums stay in the cache. On a
  GPU and a TPU it is part of each tensor's one kernel. Without a `value` there is no sum, and
  patience alone moves the window.
- **Multipliers in bfloat16 on a CPU** save memory, but no time if there is a sum: XLA's CPU
  compiler cannot slice 16-bit floats, and converts them to float32 first.
- **The loop that moves the multipliers** runs one iteration every few epochs and none in other
  steps, and copies nothing. As a second set of loops it makes a step compile longer.
- **On a GPU** the step has a dozen more kernels than plain SGD, for scalars, the sum of the rows
  and that loop. What their launches cost is not measured.
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
    rows = results["candidates"].items()
    return _range([row["over_plain"] for key, row in rows if "state" in row and wanted(key)])


def _sum_alone() -> str:
    results = _read("optimizer_step")
    if results is None:
        return _NOT_MEASURED
    rows = {
        key: row["over_plain"]
        for key, row in results["candidates"].items()
        if key.startswith("chain") and "light" not in key
    }
    without = ", without the sum"
    unsummed = ((key.removesuffix(without), row) for key, row in rows.items() if without in key)
    return _range([rows[key] - over for key, over in unsummed])


def _copies(wanted: Callable[[str], bool]) -> str:
    results = _read("optimizer_step")
    if results is None:
        return _NOT_MEASURED
    rows, copy = results["candidates"], 4 * results["constrained"]
    plain = rows[PLAIN]["state"]
    return _range([(row["state"] - plain) / copy for key, row in rows.items() if wanted(key)])


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
    ratios = results["time_over_plain"].items()
    return _range([over for method, over in ratios if method != "plain"])


def _accuracy(experiment: str) -> str:
    """Returns the light setting's mean accuracy over constraints and seeds, minus the default's."""
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
    """Formats the table of aims and measurements."""

    def summed(key: str) -> bool:
        return key.startswith(("chain", "cbp_sgd")) and not key.endswith("sum") and not light(key)

    def unsummed(key: str) -> bool:
        return key.endswith("without the sum") and not light(key)

    def light(key: str) -> bool:
        return "light" in key

    gpu, step = "optimizer_step_gpu", "optimizer step over plain SGD"
    resnet50 = "training step over plain, ResNet-50, batch 256, bfloat16, accelerator"
    accuracy = "accuracy of the light setting in bfloat16 over the default, digits"
    rows = [
        (f"{step}, CPU, without the sum", "1.8", _step("optimizer_step", unsummed)),
        ("the same, with the sum", "", _step("optimizer_step", summed)),
        ("the sum alone", "", _sum_alone()),
        (f"{step}, GPU", "1.3", _step(gpu, summed)),
        ("`quantize` over a copy of the weights, CPU", "1", _quantize("forward_quantize")),
        ("the same, GPU", "1", _quantize("forward_quantize_gpu")),
        ("training step over plain, ResNet-20, CPU", "", _train("resnet20")),
        (resnet50, "1.02", _train("resnet50")),
        ("copies of the constrained weights in the state, default", "3.0", _copies(summed)),
        ("the same, light setting, float32 and bfloat16", "1.0", _copies(light)),
        (accuracy, "0", _accuracy("digits")),
        ("the same, Fashion-MNIST", "0", _accuracy("fashion_mnist")),
    ]
    return format_table(("", "at most, or aim", "measured"), rows)


def write() -> None:
    """Writes the page from the results that exist."""
    parts = [
        "# Speed and memory\n"
        "This page is written by `cd experiments && TFDS_DATA_DIR=DIR python -m benchmarks "
        "--authors=CLONE`, where `CLONE` is one of the authors' repository, dooseokjeong/CBP, and "
        "may be left out; `python -m benchmarks --only=` only rewrites the page. Times are ratios "
        "within one run: candidates take turns, and the medians over turns count.",
        "The light setting is `multiplier_optimizer=optax.chain(optax.clip(3e-3), optax.sgd(rate / "
        '3e-3)), multiplier_dtype="bfloat16"`: a multiplier grows by `rate * min(violation / 3e-3, '
        "1)`, which needs no moments.",
        aims(),
        "What is not measured needs an accelerator, and the same command there. What XLA makes of "
        "the step for a GPU and a TPU is known without one, see below. Rows without an aim have "
        "none: the sum on a CPU is reported separately.",
        _WHY.strip(),
    ]
    for name in _PAGES:
        path = RESULTS / f"{name}.md"
        if path.is_file():
            parts.append(re.sub("^#", "##", path.read_text().strip(), flags=re.MULTILINE))
    parts.append(
        "## Other benchmarks\n"
        "Of deployment and of reading data, each with its own command: [packed weights in "
        "JAX](results/inference_memory.md), [ONNX Runtime](results/onnx_runtime.md), [photo "
        "decoders](results/decoders.md)."
    )
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n")
    print(f"written to {HERE / 'README.md'}")
