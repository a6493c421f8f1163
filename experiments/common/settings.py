"""Configs as `ml_collections`, every field of which is a flag: `--config.FIELD=VALUE`."""

from collections.abc import Callable

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags


def small_experiment() -> ml_collections.ConfigDict:
    """The fields of the small experiments (digits, Fashion-MNIST), with the values both use."""
    config = ml_collections.ConfigDict()
    config.constraint = "all"  # or binary, ternary, one_bit_shift, two_bit_shift
    config.seed = 0
    config.batch_size = 128
    config.steps_per_epoch = 100  # steps that make an epoch of the schedule, whatever the data set's size
    config.pretrain_epochs = 20
    config.pretrain_learning_rate = 0.1
    config.epochs = 240
    config.learning_rate = 1e-2
    config.lr_decay = 0.1  # of the learning rate under CBP, from lr_decay_window on
    config.lr_decay_window = 20
    config.multiplier_learning_rate = 1e-3
    config.patience = 5
    config.window_factor = 0.0  # of the window from 10 on; 0: steps of 10, as in the paper
    config.weight_decay = 1e-4
    return config


def run_main(config: ml_collections.ConfigDict, workdir: str, main: Callable[[ml_collections.ConfigDict, str], object]) -> None:
    """Parses `--config.FIELD=VALUE` and `--workdir=DIR`, then calls `main(config, workdir)`."""
    config_flag = config_flags.DEFINE_config_dict("config", config, "Settings; any field can be overridden.")
    workdir_flag = flags.DEFINE_string("workdir", workdir, "Folder that receives what the run writes.")

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(f"unexpected arguments {argv[1:]}: write --config.FIELD=VALUE or --workdir=DIR")
        logging.set_verbosity(logging.ERROR)  # Orbax and TFDS log much that is of no interest here
        main(config_flag.value, workdir_flag.value)

    app.run(call)
