"""Exports a run to a file, and reports the file's size and the accuracy read back from it.

    python experiments/export.py --workdir=runs/digits/binary --format=packed --round
    python experiments/export.py --workdir=runs/digits/binary --format=onnx --weight_type=int2
    python experiments/export.py --workdir=runs/resnet50_binary --data_dir=DIR --limit=1000

A packed file (`cbp_jax.load_packed` reads it) holds the weights in the bits of their constraint; an
ONNX file holds the whole network, for ONNX Runtime. Weights off their levels by more than 1% of the
scale are refused in a packed file, unless `--round` is given.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from absl import app, flags, logging
from common.launch import end_on_interrupt
from common.report import deploy
from common.report.workdir import float32_bytes, size_text
from common.training.restore import Run, restore
from common.training.settle import is_constrained
from flax import nnx

import cbp_jax

FLAGS = flags.FLAGS


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


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.FATAL)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    workdir, onnx = Path(FLAGS.workdir), FLAGS.format == "onnx"
    path = Path(FLAGS.output or workdir / (deploy.ONNX_FILE if onnx else deploy.PACKED_FILE))
    changes = {
        "data": FLAGS.data,
        "data_dir": FLAGS.data_dir,
        "eval_batch_size": FLAGS.batch_size,
        "dtype": "float32" if onnx else "",  # ONNX Runtime does not convolve bfloat16 on a CPU
    }
    try:
        run = restore(workdir, changes, FLAGS.limit or None)
        check_constrained(run, workdir)
        if onnx:
            scores = export_onnx(run, path, FLAGS.weight_type)
        else:
            scores = export_packed(run, path, FLAGS.round)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}".replace("give round=True", "give --round"))
    size, float32 = path.stat().st_size, float32_bytes((run.state.params, run.state.batch_stats))
    ratio = f"{float32 / size:.1f} times less than the {size_text(float32)} of float32"
    print(f"{path}: {size_text(size)}, {ratio}")
    accuracy = f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%}"
    print(f"{accuracy} on {scores['images']:.0f} images, read back from the file")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "The folder of a constrained run.", required=True)
    flags.DEFINE_enum("format", "packed", ("packed", "onnx"), "What to write.")
    flags.DEFINE_string("output", "", "By default weights.safetensors or model.onnx there.")
    flags.DEFINE_enum(
        "weight_type", "int4", ("int4", "int2", "float"), "Of the constrained weights in ONNX."
    )
    flags.DEFINE_bool("round", False, "Snap remaining weights to the nearest level.")
    flags.DEFINE_string("data", "", "tfds, folder, cifar10, ... instead of the run's.")
    flags.DEFINE_string("data_dir", "", "The folder of the data.")
    flags.DEFINE_integer("batch_size", 0, "Images at a time.")
    flags.DEFINE_integer("limit", 0, "Evaluate on so many images, evenly spread; 0: on all.")
    end_on_interrupt("interrupted")
    app.run(main)
