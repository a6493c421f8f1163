"""Counts what XLA makes of the optimizer's step on ResNet-50: kernels, memory traffic, copies.

    cd experiments && python -m benchmarks.compiled

XLA compiles for an absent accelerator if its compiler is installed: `pip install "jax[cuda12]"` for
an H100-class GPU (without a driver set JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1), `pip install libtpu` for
a TPU v4. Platforms without a compiler are left out, and the page says so. Nothing is timed. Writes
`results/compiled.json` and `.md`.
"""

import math
import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from absl import app, flags
from benchmarks import timing, weights
from benchmarks.steps import make_step
from common.report.tables import format_table
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

import cbp_jax

CONSTRAINTS = ("binary", "ternary", "one_bit_shift", "two_bit_shift")
# An H100-class GPU, described as XLA wants it to compile for one that is absent.
_GPU = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_ITEM_BYTES = {
    **{"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4},
    **{"s64": 8, "u64": 8, "f64": 8},
}
# Operations that move no data of their own.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all"),
    *("partition-id", "moving"),
}

_PLATFORMS = flags.DEFINE_list("platforms", ["cpu", "cuda", "tpu"], "Platforms to compile for.")


class Instruction(NamedTuple):
    """A line of HLO."""

    name: str
    operation: str
    bytes: int  # of its result
    operands: list[str]


def entry(text: str) -> list[Instruction]:
    """Parses the instructions of a compiled module's entry computation."""
    lines = text[text.index("\nENTRY ") :].splitlines()[2:]
    found = []
    for line in lines:
        match = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)", line)
        if match:
            name, shape, operation, rest = match.groups()
            if operation == "while" and "move_multipliers" in line:
                operation = "moving"  # one iteration every few epochs, none in other steps
            operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
            found.append(Instruction(name, operation, shape_bytes(shape), operands))
    return found


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a type or tuple of types in HLO's notation."""
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", re.sub(r"/\*.*?\*/", "", shape))
    return sum(
        _ITEM_BYTES.get(dtype, 4) * math.prod(int(dim) for dim in dims.split(",") if dim)
        for dtype, dims in arrays
    )


def describe(compiled: Any, weight_bytes: int, smallest: int) -> dict[str, float]:
    """Counts kernels, words read and written per parameter, copied tensors, temporary bytes."""
    instructions = entry(compiled.as_text())
    size = {instruction.name: instruction.bytes for instruction in instructions}
    always = ("fusion", "reduce", "custom-call", "while")
    kernels = [
        i
        for i in instructions
        if i.operation not in _FREE
        and not i.operation.endswith(("-start", "-done"))
        and (i.bytes > 64 or i.operation in always)
    ]
    # A loop passes on its operands, so it only reads them.
    moved = sum(
        (0 if i.operation == "while" else i.bytes) + sum(size.get(name, 0) for name in i.operands)
        for i in kernels
    )
    return {
        "kernels": len(kernels),
        "loops": sum(i.operation == "while" for i in kernels),
        "words": moved / weight_bytes,
        "copies": sum(i.operation == "copy" and i.bytes >= smallest for i in kernels),
        "temporary": compiled.memory_analysis().temp_size_in_bytes,
    }


def device_of(platform: str) -> Any:
    """Returns a device to compile for, present or not; None if its compiler is not installed."""
    if platform == "cpu":
        return jax.devices("cpu")[0]
    try:
        if platform == "cuda":
            options = {"topology": "1x1x1", "target_config": _GPU}
            return topologies.get_topology_desc("1x1x1", "cuda", **options).devices[0]
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v4-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        return topologies.get_topology_desc("v4:2x2x1", "tpu").devices[0]
    except (NotImplementedError, RuntimeError) as error:
        print(f"{platform}: {error}")
        return None


def _on_device(tree: Any, device: Any) -> Any:
    sharding = SingleDeviceSharding(device)

    def place(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree)


def measure() -> dict[str, Any]:
    """Returns one row per platform and step."""
    shapes, mask = weights.resnet50()
    sgd = optax.sgd(1e-3, momentum=0.9)
    chains = {name: optax.chain(cbp_jax.cbp(name, mask=mask), sgd) for name in CONSTRAINTS}
    steps: dict[str, tuple[Any, bool]] = {"SGD with momentum": (sgd, False)}
    steps |= {f"chain, {name}": (chain, True) for name, chain in chains.items()}
    steps["chain, ternary, without the sum"] = chains["ternary"], False
    steps["cbp_sgd, ternary"] = cbp_jax.cbp_sgd(1e-3, "ternary", mask=mask), True
    leaves, total = jax.tree.leaves(shapes), timing.tree_bytes(shapes)
    smallest = min(4 * leaf.size for leaf in leaves if leaf.ndim > 1)
    rows: dict[str, dict[str, Any]] = {}
    for platform in _PLATFORMS.value:
        device = device_of(platform)
        if device is None:
            continue
        rows[platform] = {}
        for name, (optimizer, with_value) in steps.items():
            state = jax.eval_shape(optimizer.init, shapes)
            args = (shapes, state, shapes, jax.ShapeDtypeStruct((), jnp.float32))
            lowered = make_step(optimizer, with_value).lower(*_on_device(args, device))
            rows[platform][name] = describe(lowered.compile(), total, smallest)
    return {"jax": jax.__version__, "parameters": len(leaves), "platforms": rows}


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    titles = {"cpu": "CPU", "cuda": "GPU, H100 class", "tpu": "TPU v4"}
    parts = [
        "# What XLA makes of the optimizer's step\n"
        f"ResNet-50, {results['parameters']} tensors, jax {results['jax']}, compiled for each "
        "platform, not run. Words: float32 numbers that the kernels read and write per parameter; "
        "plain SGD with momentum needs 5, CBP 6. Copies: of whole tensors, without the loop that "
        "moves the multipliers every few epochs. On a TPU, data prefetched from one memory into "
        "another count twice. By `python -m benchmarks.compiled`."
    ]
    for platform, steps in results["platforms"].items():
        rows = [
            (
                name,
                str(row["kernels"]),
                str(row["loops"]),
                f"{row['words']:.2f}",
                str(row["copies"]),
                f"{row['temporary'] / 2**20:.1f}",
            )
            for name, row in steps.items()
        ]
        header = ("step", "kernels", "loops among them", "words", "copies", "temporary, MiB")
        parts.append(f"## {titles[platform]}\n{format_table(header, rows)}")
    missing = [title for platform, title in titles.items() if platform not in results["platforms"]]
    if missing:
        parts.append(f"Left out, because the compiler is not installed: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    results = measure()
    timing.write("compiled", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
