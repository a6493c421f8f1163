"""Speed and exactness of integer weights in ONNX Runtime, against float32 there and in JAX.

    cd experiments && python -m benchmarks.onnx_runtime
    cd experiments && python -m benchmarks.onnx_runtime --tiny  # tests this script

On the CPU, with the libraries' default number of threads. Weights are random, on ternary levels.
The variants take turns, so that other load affects them all, and the medians count. Writes
`results/onnx_runtime.json` and `.md`; with --tiny only if --out is given.
"""

import importlib.metadata
import itertools
import os
import pathlib
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnxruntime
from absl import app, flags
from benchmarks import timing
from benchmarks.decoders import cpu_model
from common import models
from common.report.tables import format_table
from flax import nnx

import cbp_jax

PyTree = Any
Run = Callable[[], np.ndarray]

LIBRARIES = ("onnxruntime", "jax", "jax2onnx", "numpy")
FLOAT, JAX = "float32", "JAX float32"
INTEGERS = {"int4": "INT4", "int2": "INT2"}
EXACT = {"session.qdq_matmulnbits_accuracy_level": "1"}
SLOWER, FASTER = 1.05, 0.95  # relative to float32; in between counts as equally fast
LEAST_ROUNDS = 3
WARM_UP = 0.1  # seconds before each timed run, and at least one run

_SECONDS = flags.DEFINE_float("seconds", 30, f"Per case and batch; {LEAST_ROUNDS} rounds or more.")
_TINY = flags.DEFINE_bool("tiny", False, "Small sizes and few rounds, to test this script.")
_OUT = flags.DEFINE_string("out", None, "Folder for the results; by default `results`.")


class Case(NamedTuple):
    """A network to measure."""

    name: str
    model: Any  # as for export_onnx
    forward: Callable[[PyTree, jax.Array], jax.Array]
    params: PyTree
    constrained: str | None  # a pattern for `cbp_jax.select`; None: all
    shape: tuple[int, ...]  # of one input
    # Whether ONNX Runtime multiplies packed integers; if not, its accuracy level has no effect.
    multiplies: bool = False


class Chain(nnx.Module):
    """Dense layers, each with what follows it in networks."""

    def __init__(
        self, width: int, activation: Callable[[jax.Array], jax.Array], bias: bool, norm: bool
    ):
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(width, width, use_bias=bias, rngs=rngs) for _ in range(3)]
        self.layers = nnx.List(layers)
        self.norms = nnx.List([nnx.BatchNorm(width, rngs=rngs) if norm else None for _ in range(3)])
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)
            x = self.activation(x if norm is None else norm(x))
        return x


# By name: activation, whether there is a bias, whether there is a batch norm.
CHAINS: dict[str, tuple[Callable[[jax.Array], jax.Array], bool, bool]] = {
    "relu": (jax.nn.relu, False, False),
    "gelu": (jax.nn.gelu, False, False),
    "bias and relu": (jax.nn.relu, True, False),
    "batch norm and relu": (jax.nn.relu, False, True),
}


def chain(
    name: str, width: int, activation: Callable[[jax.Array], jax.Array], bias: bool, norm: bool
) -> Case:
    """Three dense layers."""
    model = Chain(width, activation, bias, norm)
    model.eval()
    graphdef, params, batch_stats = models.split_model(model)

    def forward(params: PyTree, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, batch_stats)(x)

    return Case(name, model, forward, params, "layers/.*/kernel", (width,), multiplies=True)


class Measured(NamedTuple):
    """A variant of a case, ready to run."""

    bytes: int
    bind: Callable[[jax.Array], Run]


def cases() -> Iterator[Case]:
    """Yields the cases to measure."""
    features, width, channels, image, photo = (
        (64, 32, 8, 8, 32) if _TINY.value else (4096, 2048, 256, 28, 224)
    )

    def dense(params: PyTree, x: jax.Array) -> jax.Array:
        return x @ params["kernel"]

    params = {"kernel": jax.random.normal(jax.random.key(0), (features, features))}
    name = f"dense {features}x{features}"
    yield Case(name, dense, dense, params, None, (features,), multiplies=True)

    for name, (activation, bias, norm) in CHAINS.items():
        yield chain(f"three dense layers of {width}, {name}", width, activation, bias, norm)

    def convolution(params: PyTree, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    params = {"kernel": jax.random.normal(jax.random.key(1), (3, 3, channels, channels))}
    name = f"3x3 convolution, {channels} channels, {image}x{image}"
    yield Case(name, convolution, convolution, params, None, (image, image, channels))

    model = models.create("resnet18", rngs=nnx.Rngs(0))
    model.eval()
    graphdef, weights, batch_stats = models.split_model(model)

    def network(params: PyTree, x: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params, batch_stats)(x)

    name, shape = f"ResNet-18, {photo}x{photo}", (photo, photo, 3)
    yield Case(name, model, network, weights, model.constrained, shape)


def variants(case: Case, folder: pathlib.Path) -> dict[str, Measured]:
    """Returns the variants of a case by name; writes the ONNX files to the folder."""
    mask = cbp_jax.select(include=case.constrained)
    opt_state = cbp_jax.cbp("ternary", mask=mask).init(case.params)
    example = jax.random.normal(jax.random.key(2), (2, *case.shape))

    def in_onnx(weight_type: str, options: Sequence[Mapping[str, str]]) -> list[Measured]:
        path = folder / f"{weight_type}.onnx"
        cbp_jax.export_onnx(case.model, case.params, opt_state, example, path, weight_type)
        return [Measured(path.stat().st_size, _session(path, option)) for option in options]

    found = {FLOAT: in_onnx("float", [{}])[0]}
    for weight_type, name in INTEGERS.items():
        modes = {f"{name} exact": EXACT, f"{name} default": {}} if case.multiplies else {name: {}}
        found |= zip(modes, in_onnx(weight_type, list(modes.values())), strict=True)

    weights = cbp_jax.quantize(case.params, opt_state)
    forward = jax.jit(case.forward)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    # Converted to numpy to wait for the result.
    found[JAX] = Measured(size, lambda x: lambda: np.asarray(forward(weights, x)))
    return found


def _session(path: pathlib.Path, config: Mapping[str, str]) -> Callable[[jax.Array], Run]:
    """Loads an ONNX file."""
    options = onnxruntime.SessionOptions()
    # Threads that spin while they wait would slow down the next variant.
    for key, value in {"session.force_spinning_stop": "1", **config}.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def bind(x: jax.Array) -> Run:
        inputs = {"input": np.asarray(x)}
        return lambda: session.run(None, inputs)[0]

    return bind


def measure(found: Mapping[str, Measured], x: jax.Array, seconds: float) -> dict[str, Any]:
    """Measures each variant: bytes, median latency, also over float32's, difference from JAX."""
    runs = {name: variant.bind(x) for name, variant in found.items()}
    outputs, order = {name: run() for name, run in runs.items()}, list(runs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    for rounds in itertools.count():
        if rounds >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        # Shuffled, because a variant leaves the next one its cache and threads slow to stop.
        random.Random(rounds).shuffle(order)
        for name in order:
            turn = time.perf_counter()
            while (before := time.perf_counter()) < turn + WARM_UP:
                runs[name]()
            runs[name]()
            times[name].append(time.perf_counter() - before)
    largest = np.max(np.abs(outputs[JAX]))
    rows = {
        name: {
            "bytes": found[name].bytes,
            "milliseconds": 1000 * statistics.median(times[name]),
            "over_float32": timing.ratio(times, name, FLOAT),
            "difference": float(np.max(np.abs(outputs[name] - outputs[JAX])) / largest),
        }
        for name in runs
    }
    return {"rounds": len(times[FLOAT]), "variants": rows}


def measure_all() -> dict[str, Any]:
    """Measures all cases with all batch sizes, and describes the machine."""
    seconds = 0.0 if _TINY.value else _SECONDS.value
    measured = []
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            found = variants(case, pathlib.Path(folder))
        for batch in (1, 2) if _TINY.value else (1, 64):
            x = jax.random.normal(jax.random.key(3), (batch, *case.shape))
            measured.append({"case": case.name, "batch": batch, **measure(found, x, seconds)})
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "seconds": seconds,
        "measured": measured,
    }


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """Says where integers are slower than, faster than or as fast as float32 in ONNX Runtime."""
    slower = f"slower than float32 (more than {SLOWER:g} times its time)"
    faster = f"faster than float32 (less than {FASTER:g} times its time)"
    equal = "as fast as float32"
    places: dict[str, list[str]] = {slower: [], faster: [], equal: []}
    for entry in results["measured"]:
        here: dict[str, list[str]] = {verdict: [] for verdict in places}
        for name, row in entry["variants"].items():
            if name not in (FLOAT, JAX):
                ratio = row["over_float32"]
                verdict = slower if ratio > SLOWER else faster if ratio < FASTER else equal
                here[verdict].append(f"{name} {ratio:.2f}")
        for verdict, names in here.items():
            if names:
                place = f"{entry['case']}, batch {entry['batch']} ({', '.join(names)})"
                places[verdict].append(place)
    return [
        f"Integer weights are {verdict} for: {'; '.join(found) or 'none'}."
        for verdict, found in places.items()
    ]


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    libraries = ", ".join(f"{name} {version}" for name, version in results["libraries"].items())
    options = ", ".join(f"`{key}` = `{value}`" for key, value in EXACT.items())
    parts = [
        "# Integer weights in ONNX Runtime\n"
        f"{results['cpu']}, {results['cores']} cores, Python {results['python']}, {libraries}; "
        "medians over rounds in which each variant runs once, after "
        f"{WARM_UP:g} s of warm-up. By `python -m benchmarks.onnx_runtime`.",
        f"`{FLOAT}` and the integers are files of `export_onnx` with the same ternary weights; "
        f"`exact` has the session option {options}, `default` has not (it has no effect where no "
        f"matrix product takes packed integers). `{JAX}` is compiled, with the weights as "
        "arguments, and its size is that of the weights. Time over float32 is the median of the "
        f"rounds' ratios to `{FLOAT}`; the difference is the largest from JAX's outputs, relative "
        "to the largest output.",
    ]
    for entry in results["measured"]:
        rows = [
            (
                name,
                f"{row['bytes'] / 1e6:.3f}",
                f"{row['milliseconds']:.3f}",
                f"{row['over_float32']:.2f}",
                "" if name == JAX else f"{row['difference']:.1e}",
            )
            for name, row in entry["variants"].items()
        ]
        title = f"## {entry['case']}, batch {entry['batch']} ({entry['rounds']} rounds)"
        header = ("weights", "MB", "ms", "time over float32", "difference")
        parts.append(f"{title}\n{format_table(header, rows)}")
    sentences = "\n".join(f"- {sentence}" for sentence in verdicts(results))
    parts += [
        f"## Slower or faster\n{sentences}",
        "These results are of one run on one machine; others may differ.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    jax.config.update("jax_platforms", "cpu")  # where ONNX Runtime computes
    results = measure_all()
    out = _OUT.value or (None if _TINY.value else timing.RESULTS)
    if out:
        timing.write("onnx_runtime", results, as_markdown(results), pathlib.Path(out))
    else:
        print(as_markdown(results))


if __name__ == "__main__":
    app.run(main)
