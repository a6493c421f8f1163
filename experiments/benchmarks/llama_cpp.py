"""Size, exactness and speed of finished Llamas in llama.cpp, as GGUF files of several types.

    cd experiments && python -m benchmarks.llama_cpp --runs=RUNS/full_precision,RUNS/ternary_closing

Takes runs of the network `llama`, of one width or several. A run in full precision is written as
F32 and Q8_0; a constrained one as F32, and in the low-bit types that hold its levels, with
embedding and head in F32 and in Q8_0. Bits per byte are of windows of the run's test part, by JAX
and by llama.cpp. For tokens per second the files take turns, so that other load affects them all,
and the medians count. Writes `results/llama_cpp.json` and `.md`. It needs the extra `llama`, and is
not part of `python -m benchmarks`.
"""

import contextlib
import importlib.metadata
import os
import pathlib
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from benchmarks import timing
from benchmarks.decoders import cpu_model
from common.report.llama_cpp import LlamaCpp, Speed
from common.report.llama_gguf import export_llama
from common.report.tables import format_table
from common.report.workdir import METHODS, Summary, float32_bytes
from common.training.restore import Run, restore
from common.training.settle import is_constrained
from flax import nnx

import cbp_jax

LIBRARIES = ("xllamacpp", "gguf")
FLOAT, OTHER = "F32", "Q8_0"
LOW_BIT = {
    "binary": ("Q1_0",),
    "ternary": ("TQ2_0", "TQ1_0"),
    "one_bit_shift": ("Q4_0",),
    "two_bit_shift": ("Q4_0",),
}
PROMPT, GENERATED = 32, 160  # bytes of the text that is shown

_RUNS = flags.DEFINE_list("runs", [], "Workdirs of finished runs of the network llama.")
_WINDOWS = flags.DEFINE_integer("windows", 16, "Of the test part, evenly spread.")
_ROUNDS = flags.DEFINE_integer("rounds", 15, "In which each file is timed once.")
_THREADS = flags.DEFINE_integer("threads", 1, "Of llama.cpp.")
_FOLDER = flags.DEFINE_string("folder", str(timing.RESULTS), "Folder for the results.")


class Passage(NamedTuple):
    """Windows of held-out text, and JAX's log-probabilities there."""

    tokens: np.ndarray  # (windows, tokens)
    labels: np.ndarray  # (windows, tokens), the bytes that follow
    expected: np.ndarray  # (windows, tokens, 256)


def read_passage(run: Run) -> Passage:
    """Evaluates JAX on the windows of a run, without the last token, as llama.cpp has no room."""
    state = run.state
    constrained = is_constrained(run.config)
    weights = cbp_jax.quantize(state.params, state.opt_state) if constrained else state.params
    model = nnx.merge(run.graphdef, weights, state.batch_stats)
    parts = []
    for batch in run.batches():
        kept = np.all(np.asarray(batch["label"]) >= 0, axis=1)  # without padding
        tokens, labels = (np.asarray(batch[name])[kept, :-1] for name in ("image", "label"))
        parts.append((tokens, labels, np.asarray(jax.nn.log_softmax(model(jnp.asarray(tokens))))))
    return Passage(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def bits_per_byte(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean of -log2 of the labels' probabilities."""
    found = np.take_along_axis(log_probabilities, labels[..., np.newaxis], axis=-1)
    return float(-np.mean(found, dtype=np.float64) / np.log(2))


def describe(run: Run, distilled: bool) -> dict[str, Any]:
    """Returns what tells runs apart."""
    config = run.config
    sizes = {name: config[name] for name in ("width", "depth", "hidden", "context")}
    constraint, weights = "", "full precision"
    if is_constrained(config):
        constraint = config.constraint
        weights = f"{constraint}, {METHODS[config.method]}"
    if distilled:
        weights += ", distilled"
    return {**sizes, "constraint": constraint, "weights": weights}


def file_types(run: Run) -> dict[str, tuple[str | None, str]]:
    """Returns the types of constrained weights and of the others, by the file's name; F32 first."""
    if not is_constrained(run.config):
        return {FLOAT: (None, FLOAT), OTHER: (None, OTHER)}
    low = LOW_BIT.get(run.config.constraint, ())
    types: dict[str, tuple[str | None, str]] = {kind: (kind, FLOAT) for kind in (FLOAT, *low)}
    return types | {f"{kind}, {OTHER}": (kind, OTHER) for kind in low[:1]}


def compare(loaded: LlamaCpp, passage: Passage) -> dict[str, Any]:
    """Compares llama.cpp with JAX on a passage, and shows how it continues its beginning."""
    found = np.stack([loaded.log_probabilities(window.tolist()) for window in passage.tokens])
    prompt = bytes(passage.tokens[0, :PROMPT].tolist()).decode(errors="ignore")
    return {
        "bits_per_byte": bits_per_byte(found, passage.labels),
        "difference": float(np.max(np.abs(found - passage.expected))),
        "prompt": prompt,
        "text": loaded.generate(prompt, GENERATED).removeprefix(prompt),
    }


def take_turns(
    files: Mapping[str, tuple[LlamaCpp, np.ndarray]], rounds: int
) -> dict[str, list[Speed]]:
    """Times each file once per round: half a window read, the other half generated."""
    speeds: dict[str, list[Speed]] = {name: [] for name in files}
    order = list(files)
    for turn in range(rounds + 1):
        random.Random(turn).shuffle(order)  # a file leaves its cache to the next one
        for name in order:
            loaded, window = files[name]
            half = len(window) // 2
            speed = loaded.speed(window[:half].tolist(), half)
            if turn:  # the first round warms up
                speeds[name].append(speed)
    return speeds


def measure(
    workdirs: Sequence[pathlib.Path], windows: int, rounds: int, threads: int
) -> list[dict[str, Any]]:
    """Returns one row per file.

    Raises:
      FileNotFoundError: if there is no such run, or it has not finished.
      ValueError: if a network is no Llama, or its layers do not fit a type.
      ImportError: if an extra is not installed.
    """
    rows: dict[str, dict[str, Any]] = {}
    timed = {}
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for number, workdir in enumerate(workdirs):
            summary = Summary.read(workdir)  # raises if the run has not finished
            run = restore(workdir, {"dtype": "float32"}, windows, test=True)
            state, parameters = run.state, float32_bytes(run.state.params) // 4
            opt_state = state.opt_state if is_constrained(run.config) else None
            passage = read_passage(run)
            for kind, types in file_types(run).items():
                path = folder / f"{number}_{kind}.gguf"
                deviation = export_llama(path, run.config, state.params, opt_state, *types)
                loaded = stack.enter_context(LlamaCpp(path, threads))
                timed[path.stem] = (loaded, passage.tokens[0])
                rows[path.stem] = {
                    "run": number,
                    **describe(run, summary.distilled),
                    "file": kind,
                    "parameters": parameters,
                    "bytes": path.stat().st_size,
                    "bits_per_weight": 8 * path.stat().st_size / parameters,
                    "weights_differ": deviation,
                    "bits_per_byte_jax": bits_per_byte(passage.expected, passage.labels),
                    "bytes_of_text": int(passage.labels.size),
                    **compare(loaded, passage),
                }
        speeds = take_turns(timed, rounds)
    for name, row in rows.items():
        reference = speeds[f"{row['run']}_{FLOAT}"]
        pairs = list(zip(speeds[name], reference, strict=True))
        row |= {
            "prompt_per_second": statistics.median(own.prompt for own, _ in pairs),
            "generated_per_second": statistics.median(own.generation for own, _ in pairs),
            "prompt_over_f32": statistics.median(own.prompt / f32.prompt for own, f32 in pairs),
            "generated_over_f32": statistics.median(
                own.generation / f32.generation for own, f32 in pairs
            ),
        }
    return list(rows.values())


HEADER = (
    *("width", "weights", "file", "MB", "bits per weight", "bits per byte, JAX", "llama.cpp"),
    *("largest difference", "tokens/s", "over F32", "prompt, tokens/s", "prompt over F32"),
)


# Of HEADER, those that docs/llama.md has room for.
SHORT = (
    *("width", "weights", "file", "MB", "bits per weight", "bits per byte, JAX", "llama.cpp"),
    *("tokens/s", "over F32"),
)


def table(results: Mapping[str, Any], columns: Sequence[str] = HEADER) -> str:
    """Formats one row per file."""
    rows = [
        (
            str(row["width"]),
            row["weights"],
            row["file"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['bits_per_byte_jax']:.4f}",
            f"{row['bits_per_byte']:.4f}",
            f"{row['difference']:.1e}",
            f"{row['generated_per_second']:,.0f}",
            f"{row['generated_over_f32']:.2f}",
            f"{row['prompt_per_second']:,.0f}",
            f"{row['prompt_over_f32']:.2f}",
        )
        for row in results["files"]
    ]
    chosen = [HEADER.index(column) for column in columns]
    return format_table(columns, [[row[index] for index in chosen] for row in rows])


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    libraries = ", ".join(f"{name} {version}" for name, version in results["libraries"].items())
    files = results["files"]
    texts = [
        f"### Width {row['width']}, {row['weights']}, {row['file']}\n```text\n{row['text']}\n```"
        for row in files
    ]
    parts = [
        "# Llamas in llama.cpp\n"
        f"{results['cpu']}, {results['threads']} of {results['cores']} cores, {libraries}, jax "
        f"{results['jax']}; medians over {results['rounds']} rounds in which each file is timed "
        "once, by llama.cpp's clock. By `python -m benchmarks.llama_cpp`.",
        f"Bits per byte are of {files[0]['bytes_of_text']:,} bytes of held-out text; the "
        "difference is the largest from JAX's log-probabilities of all bytes there. `F32` holds "
        "the run's weights, on their levels if they are constrained; beside low-bit layers, "
        "embedding and head are F32, or Q8_0 where that is named. Tokens per second are of "
        "generation and of reading a prompt; over F32: the median of the rounds' ratios to the "
        "same run's `F32`. Keys and values are float32.",
        table(results),
        f"## Text\nThe likeliest bytes after {files[0]['prompt']!r}:",
        *texts,
        "These results are of one run on one machine; others may differ.",
    ]
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if not _RUNS.value:
        raise app.UsageError("name the workdirs of finished runs: --runs=DIR,DIR")
    logging.set_verbosity(logging.FATAL)
    jax.config.update("jax_platforms", "cpu")  # where llama.cpp computes
    workdirs = [pathlib.Path(workdir) for workdir in _RUNS.value]
    rounds, threads = _ROUNDS.value, _THREADS.value
    try:
        files = measure(workdirs, _WINDOWS.value, rounds, threads)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    results = timing.environment() | {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "rounds": rounds,
        "libraries": {name: importlib.metadata.version(name) for name in LIBRARIES},
        "files": files,
    }
    timing.write("llama_cpp", results, as_markdown(results), pathlib.Path(_FOLDER.value))


if __name__ == "__main__":
    app.run(main)
