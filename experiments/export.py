"""Turns a finished run into a file, and measures what the file is worth: its size, and the accuracy
read back from it.

    python experiments/export.py --workdir=runs/digits/binary --format=packed --round
    python experiments/export.py --workdir=runs/digits/binary --format=onnx --weight_type=int2
    python experiments/export.py --workdir=runs/resnet50_binary --format=packed --data_dir=DIR
    --limit=1000

A packed file (`cbp_jax.load_packed` reads it) holds the weights in the bits of their constraint; an
ONNX file is the whole network, to be run with ONNX Runtime. Weights off their levels by more than
1% of the scale are not packed, unless `--round` is given.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from common.report import deploy, float32_bytes, size_text
from common.training import restore as finished
from common.training import setup as networks
from common.training.restore import Run
from flax import nnx

import cbp_jax

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder of a run under one constraint.", required=True
)
_FORMAT = flags.DEFINE_enum("format", "packed", ("packed", "onnx"), "What to write.")
_OUTPUT = flags.DEFINE_string(
    "output", "", "The file; by default weights.safetensors or model.onnx in the workdir."
)
_WEIGHT_TYPE = flags.DEFINE_enum(
    "weight_type", "int4", ("int4", "int2", "float"), "Of the constrained weights in ONNX."
)
_ROUND = flags.DEFINE_bool("round", False, "Put weights on their levels that are off them.")
_DATA = flags.DEFINE_string("data", "", "tfds, folder, cifar10 or synthetic.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The folder of the data.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images at a time.")
_LIMIT = flags.DEFINE_integer(
    "limit", 0, "Evaluate on so many images, evenly spread, of a long run; 0: on all."
)


def export_packed(run: Run, path: Path, round: bool) -> dict[str, float]:
    """Writes the packed file, and gives the accuracy of what `load_packed` reads from it."""
    state = run.state
    print(deploy.save(path, state.params, state.batch_stats, state.opt_state, round=round))
    return run.accuracy(*deploy.load(path, state.params, state.batch_stats))


def export_onnx(run: Run, path: Path, weight_type: str) -> dict[str, float]:
    """Writes the ONNX file, and gives the accuracy of ONNX Runtime with it."""
    model = nnx.merge(run.graphdef, run.state.params, run.state.batch_stats)
    batch = next(run.batches())
    images = np.asarray(run.preprocess(batch, jax.random.key(0)), np.float32)[:4]
    difference = cbp_jax.export_onnx(
        model, run.state.params, run.state.opt_state, images, path, weight_type
    )
    print(f"the outputs of ONNX Runtime differ from JAX's by {difference:.1e} of the largest")
    return deploy.onnx_accuracy(path, run.batches(), run.preprocess)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    workdir, onnx = Path(_WORKDIR.value), _FORMAT.value == "onnx"
    path = Path(_OUTPUT.value or workdir / (deploy.ONNX_FILE if onnx else deploy.PACKED_FILE))
    # ONNX Runtime's CPU provider convolves no bfloat16.
    changes: dict[str, Any] = {
        "data": _DATA.value,
        "data_dir": _DATA_DIR.value,
        "batch_size": _BATCH_SIZE.value,
        "dtype": "float32" if onnx else "",
    }
    try:
        if networks.saved_config(workdir).get("phase") == "pretrain":
            raise ValueError(
                f"the run in {workdir} is of phase 'pretrain': it has no constraint; name a run that post-trained"
            )
        run = finished.open_run(workdir, changes, _LIMIT.value or None)
        scores = (
            export_onnx(run, path, _WEIGHT_TYPE.value)
            if onnx
            else export_packed(run, path, _ROUND.value)
        )
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}".replace("give round=True", "give --round"))
    size, float32 = path.stat().st_size, float32_bytes((run.state.params, run.state.batch_stats))
    print(
        f"{path}: {size_text(size)}, {float32 / size:.1f} times less than the {size_text(float32)} of float32"
    )
    print(
        f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%} of {scores['images']:.0f} images, read back from the file"
    )


if __name__ == "__main__":
    app.run(main)
