"""Reading a run again: its config, its state, and the data to evaluate it on."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import digits
import fashion_mnist
import ml_collections
from flax import nnx

from common import config as settings
from common import post_training
from common.input.open import Loader, open_data
from common.report.workdir import Summary
from common.training import loop
from common.training import run as runner
from common.training import setup as networks
from common.training import step as train
from common.training.checkpoints import Checkpoints

PyTree = Any
_SMALL: dict[str, Any] = {"digits": digits, "fashion_mnist": fashion_mnist}


class Run(NamedTuple):
    """A run that was read again, and the data to evaluate it on."""

    graphdef: nnx.GraphDef
    state: train.TrainState  # with latent weights
    constrained: bool  # whether `state.opt_state` is CBP's
    accuracy: Callable[[PyTree, PyTree], dict[str, float]]  # of weights and batch statistics
    batches: Callable[[], Iterator[Any]]
    preprocess: train.Preprocess


def open_run(workdir: Path, changes: Mapping[str, Any], limit: int | None = None) -> Run:
    """Reads a run: of the small experiments one that ended, of the long ones the newest state that
    can be read.

    Args:
      workdir: of the run; of a small experiment under all constraints, the folder of one of them.
      changes: fields of its config that may differ; those that are empty or 0 stay. Of a small run,
        `data_dir` alone counts.
      limit: evaluate a long run on so many images.

    Raises:
      FileNotFoundError: if there is no such run, or its data are not there.
      ValueError: if its checkpoint is damaged.
    """
    saved = networks.saved_config(workdir)
    return (
        _long_run(workdir, changes, limit)
        if "network" in saved or not saved
        else _small_run(workdir, changes, saved)
    )


def _small_run(workdir: Path, changes: Mapping[str, Any], saved: Mapping[str, Any]) -> Run:
    below = sorted(str(path.parent) for path in workdir.glob("*/summary.json"))
    if below and not (workdir / "summary.json").exists():
        folders = " or ".join(below)
        raise FileNotFoundError(
            f"{workdir} holds one run for each of several constraints: name the folder of one, {folders}"
        )
    summary = Summary.read(workdir)
    experiment = _SMALL[summary.experiment]
    config: ml_collections.ConfigDict = experiment.get_config()
    config.update(saved)
    if changes.get("data_dir"):
        config.data_dir = changes["data_dir"]
    dataset, model = experiment.make_dataset(config), experiment.make_model(config)
    job, params, batch_stats = post_training.make_job(summary.experiment, config, dataset, model)
    return Run(
        job.graphdef,
        post_training.restore(job, workdir, summary.constraint, params, batch_stats),
        True,
        functools.partial(post_training.accuracy_of, job),
        lambda: post_training.test_batches(job),
        train.as_given,
    )


def _long_run(workdir: Path, changes: Mapping[str, Any], limit: int | None) -> Run:
    config = read_config(workdir, changes)
    loader = open_data(config)
    setup, state = restore(config, workdir, loader)
    evaluation = runner.Evaluation(setup, loader)
    return Run(
        setup.network.graphdef,
        state,
        config.phase == "post_train",
        lambda weights, batch_stats: evaluation(weights, batch_stats, limit),
        lambda: loader.evaluate(limit),
        loader.eval_preprocess,
    )


def read_config(workdir: Path, changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """The config of a long run, to be evaluated on whatever devices there are.

    Args:
      workdir: of the run.
      changes: fields that may differ from it; those that are empty or 0 stay.

    Raises:
      FileNotFoundError: if there is no `config.json`.
    """
    saved = networks.saved_config(workdir)
    if not saved:
        raise FileNotFoundError(f"there is no config.json in {workdir}")
    config = settings.long_experiment("", "binary")
    config.update({**saved, "pretrained": ""})
    apply(config, changes)
    return config


def apply(config: ml_collections.ConfigDict, changes: Mapping[str, Any]) -> None:
    """Changes the fields that are given, and those that do not matter in an evaluation; in place."""
    config.update({name: value for name, value in changes.items() if value})
    config.fsdp, config.steps_per_epoch = 1, 1  # whatever devices it was trained on


def restore(
    config: ml_collections.ConfigDict, workdir: Path, loader: Loader
) -> tuple[runner.Setup, train.TrainState]:
    """What a long run was made of, and the newest state of it that can be read.

    Args:
      config: of `read_config`.
      workdir: of the run.
      loader: its data.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      AnotherTreeError: if it is of another network than the config's.
    """
    setup = runner.make_setup(config, loader.train_images)
    checkpoints = Checkpoints(workdir / "checkpoints")
    restored = loop.restore(checkpoints, runner.initial_state(setup, config.seed)[0])
    checkpoints.close()
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir / 'checkpoints'}")
    return setup, restored[0]
