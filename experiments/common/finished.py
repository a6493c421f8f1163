"""Reading a run again: its config, and the state of its newest checkpoint."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_collections

from common import loop, networks, runner, settings, train
from common.checkpoints import Checkpoints
from common.loaders import Loader


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


def restore(config: ml_collections.ConfigDict, workdir: Path, loader: Loader) -> tuple[runner.Setup, train.TrainState]:
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
