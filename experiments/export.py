"""Exports a run to a file, and reports its size, and the accuracy or the weights read back.

    python experiments/export.py --workdir=runs/digits/binary --format=packed --round
    python experiments/export.py --workdir=runs/digits/binary --format=onnx --weight_type=int2
    python experiments/export.py --workdir=runs/resnet50_binary --data_dir=DIR --limit=1000
    python experiments/export.py --workdir=runs/shakespeare_llama/ternary_closing --format=gguf

A packed file (`cbp_jax.load_packed` reads it) holds the weights in the bits of their constraint; an
ONNX file holds the whole network, for ONNX Runtime, and a GGUF file that of a Llama, for llama.cpp.
Weights off their levels by more than 1% of the scale are refused in a packed file, unless `--round`
is given. GGUF alone holds runs in full precision as well.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from common.launch import end_on_interrupt
from common.report import deploy, llama_gguf
from common.report.workdir import float32_bytes, size_text
from common.training.restore import Run, restore
from common.training.settle import is_constrained
from flax import nnx

import cbp_jax

FLAGS = flags.FLAGS
FILES = {
    "packed": deploy.PACKED_FILE,
    "onnx": deploy.ONNX_FILE,
    "gguf": llama_gguf.GGUF_FILE,
}
WEIGHT_TYPES = {  # the first one by default
    "packed": ("",),
    "onnx": ("int4", "int2", "float"),
    "gguf": ("", "Q1_0", "TQ2_0", "TQ1_0", "Q4_0", "F16", "F32"),
}


def check_constrained(run: Run, workdir: Path) -> None:
    """Raises ValueError for a run in full precision."""
    if not is_constrained(run.config):
        kind = "phase" if run.config.phase == "pretrain" else "method"
        raise ValueError(f"{workdir} is a run of {kind} {run.config[kind]!r}, without a constraint")


def export_packed(run: Run, path: Path, round: bool) -> dict[str, float]:
    """Writes the packed file, and returns the accuracy of what `load_packed` reads from it."""
    state = run.state
    print(deploy.save(path, state.params, state.batch_stats, state.opt_state, round=round))
    return run.accuracy(*deploy.load(path, state.params, state.batch_stats))


def export_onnx(run: Run, path: Path, weight_type: str) -> dict[str, float]:
    """Writes the ONNX file, and returns the accuracy of ONNX Runtime with it."""
    state = run.state
    model = nnx.merge(run.graphdef, state.params, state.batch_stats)
    batch = next(run.batches())
    images = np.asarray(run.preprocess(batch, jax.random.key(0)), np.float32)[:4]
    difference = cbp_jax.export_onnx(
        model, state.params, state.opt_state, images, path, weight_type
    )
    print(f"outputs of ONNX Runtime differ from JAX's by {difference:.1e} of the largest")
    return deploy.onnx_accuracy(path, run.batches(), run.preprocess)


def export_gguf(run: Run, path: Path, weight_type: str, other_type: str) -> None:
    """Writes the GGUF file, and prints how exact it is and how many bits a weight takes."""
    state, opt_state = run.state, run.state.opt_state
    if not is_constrained(run.config):
        opt_state = None
        if weight_type:
            raise ValueError(
                f"--weight_type={weight_type} is for constrained weights, and this run has none: "
                f"give --other_type={' or '.join(llama_gguf.OTHER_TYPES)}"
            )
    difference = llama_gguf.export_llama(
        path, run.config, state.params, opt_state, weight_type or None, other_type
    )
    print(f"weights read back from the file differ by {difference:.1e} of their row's largest")
    bits = 8 * path.stat().st_size / (float32_bytes(state.params) / 4)
    print(f"{bits:.2f} bits per weight of the whole network")


def chosen_type(kind: str, weight_type: str) -> str:
    """Returns the type of weights to use in a format.

    Raises:
      ValueError: if the format has none of that name.
    """
    known = WEIGHT_TYPES[kind]
    if weight_type and weight_type not in known:
        raise ValueError(
            f"--format={kind} has no --weight_type={weight_type}: "
            + (f"give {' or '.join(filter(None, known))}" if any(known) else "leave it out")
        )
    return weight_type or known[0]


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.FATAL)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    workdir, kind = Path(FLAGS.workdir), FLAGS.format
    path = Path(FLAGS.output or workdir / FILES[kind])
    changes = {
        "data": FLAGS.data,
        "data_dir": FLAGS.data_dir,
        "eval_batch_size": FLAGS.batch_size,
        # ONNX Runtime does not convolve bfloat16 on a CPU.
        "dtype": "float32" if kind == "onnx" else "",
    }
    scores = None
    try:
        weight_type = chosen_type(kind, FLAGS.weight_type)
        run = restore(workdir, changes, FLAGS.limit or None)
        if kind == "gguf":
            export_gguf(run, path, weight_type, FLAGS.other_type)
        else:
            check_constrained(run, workdir)
            if kind == "onnx":
                scores = export_onnx(run, path, weight_type)
            else:
                scores = export_packed(run, path, FLAGS.round)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}".replace("give round=True", "give --round"))
    size, float32 = path.stat().st_size, float32_bytes((run.state.params, run.state.batch_stats))
    ratio = f"{float32 / size:.1f} times less than the {size_text(float32)} of float32"
    print(f"{path}: {size_text(size)}, {ratio}")
    if scores:
        accuracy = f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}"
        print(f"{accuracy} on {scores['images']:.0f} images, read back from the file")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of a run.", required=True)
    flags.DEFINE_enum("format", "packed", tuple(FILES), "What to write.")
    flags.DEFINE_string("output", "", f"By default {', '.join(FILES.values())} there.")
    flags.DEFINE_string(
        "weight_type",
        "",
        f"Of the constrained weights: in ONNX {', '.join(WEIGHT_TYPES['onnx'])}; in GGUF "
        f"{', '.join(WEIGHT_TYPES['gguf'][1:])}, by default what their levels need.",
    )
    flags.DEFINE_enum("other_type", "F32", llama_gguf.OTHER_TYPES, "Of the other matrices in GGUF.")
    flags.DEFINE_bool("round", False, "Snap remaining weights to the nearest level.")
    flags.DEFINE_string("data", "", "tfds, folder, cifar10, ... instead of the run's.")
    flags.DEFINE_string("data_dir", "", "The folder of the data.")
    flags.DEFINE_integer("batch_size", 0, "Images at a time.")
    flags.DEFINE_integer("limit", 0, "Evaluate on so many images, evenly spread; 0: on all.")
    end_on_interrupt("interrupted")
    app.run(main)
