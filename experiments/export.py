"""Turns a finished run into a file, and measures what the file is worth: its size, and the accuracy read back from it.

    python experiments/export.py --workdir=runs/digits/binary --format=packed --round
    python experiments/export.py --workdir=runs/digits/binary --format=onnx --weight_type=int2
    python experiments/export.py --workdir=runs/resnet50_binary --format=packed --data_dir=DIR --limit=1000

A packed file (`cbp_jax.load_packed` reads it) holds the weights in the bits of their constraint; an ONNX file is the whole network,
to be run with ONNX Runtime. Weights off their levels by more than 1% of the scale are not packed, unless `--round` is given.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import digits
import fashion_mnist
import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from common import deploy, finished, networks, post_training, runner, train
from common.loaders import open_data
from common.report import Summary, float32_bytes
from flax import nnx

import cbp_jax

PyTree = Any
_SMALL: dict[str, Any] = {"digits": digits, "fashion_mnist": fashion_mnist}

_WORKDIR = flags.DEFINE_string("workdir", None, "The folder of a run under one constraint.", required=True)
_FORMAT = flags.DEFINE_enum("format", "packed", ("packed", "onnx"), "What to write.")
_OUTPUT = flags.DEFINE_string("output", "", "The file; by default weights.safetensors or model.onnx in the workdir.")
_WEIGHT_TYPE = flags.DEFINE_enum("weight_type", "int4", ("int4", "int2", "float"), "Of the constrained weights in ONNX.")
_ROUND = flags.DEFINE_bool("round", False, "Put weights on their levels that are off them.")
_DATA = flags.DEFINE_string("data", "", "tfds, folder, cifar10 or synthetic.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The folder of the data.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images at a time.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Evaluate on so many images, evenly spread, of a long run; 0: on all.")


class Run(NamedTuple):
    """A finished run and the data to evaluate it on."""

    graphdef: nnx.GraphDef
    params: PyTree  # latent
    batch_stats: PyTree
    opt_state: PyTree
    accuracy: Callable[[PyTree, PyTree], dict[str, float]]  # of weights and batch statistics
    batches: Callable[[], Iterator[Any]]
    preprocess: train.Preprocess


def open_run(workdir: Path, changes: dict[str, Any], limit: int | None = None) -> Run:
    """Reads a run that ended, of the small experiments or the long ones.

    Args:
      workdir: of the run; of a small experiment under all constraints, the folder of one of them.
      changes: fields of its config that may differ; those that are empty or 0 stay.
      limit: evaluate a long run on so many images.

    Raises:
      FileNotFoundError: if there is no such run, or its data are not there.
      ValueError: if it has no constraint, or its checkpoint is damaged.
    """
    saved = networks.saved_config(workdir)
    return _long_run(workdir, changes, limit) if "network" in saved or not saved else _small_run(workdir, changes, saved)


def _small_run(workdir: Path, changes: dict[str, Any], saved: dict[str, Any]) -> Run:
    summary = Summary.read(workdir)
    experiment = _SMALL[summary.experiment]
    config: ml_collections.ConfigDict = experiment.get_config()
    config.update(saved)
    if changes.get("data_dir"):
        config.data_dir = changes["data_dir"]
    dataset, model = experiment.make_dataset(config), experiment.make_model(config)
    job, params, batch_stats = post_training.make_job(summary.experiment, config, dataset, model)
    state = post_training.restore(job, workdir, summary.constraint, params, batch_stats)
    return Run(
        job.graphdef,
        state.params,
        state.batch_stats,
        state.opt_state,
        functools.partial(post_training.accuracy_of, job),
        lambda: post_training.test_batches(job),
        train.as_given,
    )


def _long_run(workdir: Path, changes: dict[str, Any], limit: int | None) -> Run:
    config = finished.read_config(workdir, changes)
    if config.phase != "post_train":
        raise ValueError(f"the run in {workdir} is of phase {config.phase!r}: it has no constraint")
    loader = open_data(config)
    setup, state = finished.restore(config, workdir, loader)
    evaluation = runner.Evaluation(setup, loader)
    return Run(
        setup.network.graphdef,
        state.params,
        state.batch_stats,
        state.opt_state,
        lambda weights, batch_stats: evaluation(weights, batch_stats, limit),
        lambda: loader.evaluate(limit),
        loader.eval_preprocess,
    )


def export_packed(run: Run, path: Path, round: bool) -> dict[str, float]:
    """Writes the packed file, and gives the accuracy of what `load_packed` reads from it."""
    print(deploy.save(path, run.params, run.batch_stats, run.opt_state, round=round))
    return run.accuracy(*deploy.load(path, run.params, run.batch_stats))


def export_onnx(run: Run, path: Path, weight_type: str) -> dict[str, float]:
    """Writes the ONNX file, and gives the accuracy of ONNX Runtime with it."""
    model = nnx.merge(run.graphdef, run.params, run.batch_stats)
    batch = next(run.batches())
    images = np.asarray(run.preprocess(batch, jax.random.key(0)), np.float32)[:4]
    difference = cbp_jax.export_onnx(model, run.params, run.opt_state, images, path, weight_type)
    print(f"the outputs of ONNX Runtime differ from JAX's by {difference:.1e} of the largest")
    return deploy.onnx_accuracy(path, run.batches(), run.preprocess)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    workdir, onnx = Path(_WORKDIR.value), _FORMAT.value == "onnx"
    path = Path(_OUTPUT.value or workdir / (deploy.ONNX_FILE if onnx else deploy.PACKED_FILE))
    # ONNX Runtime's CPU provider convolves no bfloat16.
    changes = {
        "data": _DATA.value,
        "data_dir": _DATA_DIR.value,
        "batch_size": _BATCH_SIZE.value,
        "dtype": "float32" if onnx else "",
    }
    try:
        run = open_run(workdir, changes, _LIMIT.value or None)
        scores = export_onnx(run, path, _WEIGHT_TYPE.value) if onnx else export_packed(run, path, _ROUND.value)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}".replace("give round=True", "give --round"))
    size, float32 = path.stat().st_size, float32_bytes({"params": run.params, "batch_stats": run.batch_stats})
    print(f"{path}: {size:,} bytes, {float32 / size:.1f} times less than the {float32:,} of float32")
    print(f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%} of {scores['images']:.0f} images, read back from the file")


if __name__ == "__main__":
    app.run(main)
