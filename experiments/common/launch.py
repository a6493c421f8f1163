"""Runs an experiment from the command line: `--config.FIELD=VALUE --workdir=DIR`.

What is slow to import is imported late: processes that decode photos import the experiment's file
too, and Ctrl-C must find its handler.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

from common.config import ConfigError

if TYPE_CHECKING:
    from common.comparison import Comparison

INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C


def run(config: ml_collections.ConfigDict) -> None:
    """Parses the flags, and trains; the workdir defaults to `runs/EXPERIMENT_CONSTRAINT`."""

    def train(config: ml_collections.ConfigDict, workdir: str) -> None:
        from common.report.tables import results_table
        from common.training.run import log, train_and_evaluate

        kind = "pretrain" if config.phase == "pretrain" else config.constraint
        method = (
            f"_{config.method}" if config.phase != "pretrain" and config.method != "cbp" else ""
        )
        folder = Path(workdir or f"runs/{config.experiment}_{kind}{method}")
        summary = train_and_evaluate(config, folder)
        log(f"\n{results_table([summary])}\n\nwritten to {folder}")

    _launch(config, train)


def study(
    config: ml_collections.ConfigDict,
    prepare: Callable[[ml_collections.ConfigDict], ml_collections.ConfigDict] | None = None,
) -> None:
    """Parses the flags, and runs `common.study`; the workdir defaults to `runs/EXPERIMENT`.

    Args:
      config: the defaults.
      prepare: applied to what the flags make of it.
    """

    def train(config: ml_collections.ConfigDict, workdir: str) -> None:
        from common import study

        config = prepare(config) if prepare else config
        study.run(config, Path(workdir or f"runs/{config.experiment}"))

    _launch(config, train)


def comparison(
    config: ml_collections.ConfigDict,
    make: "Callable[[ml_collections.ConfigDict], Comparison]",
) -> None:
    """Parses the flags, and runs `common.comparison` of what `make` makes of the config."""

    def train(config: ml_collections.ConfigDict, workdir: str) -> None:
        from common import comparison

        comparison.run(make(config), Path(workdir or f"runs/study/{config.ground}"))

    _launch(config, train)


def _launch(
    config: ml_collections.ConfigDict, train: Callable[[ml_collections.ConfigDict, str], None]
) -> None:
    config_flag = config_flags.DEFINE_config_dict("config", config, "Any field can be set.")
    workdir_flag = flags.DEFINE_string("workdir", "", "Folder of the run, by default below runs/.")

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(
                f"unexpected arguments {argv[1:]}: write --config.FIELD=VALUE or --workdir=DIR"
            )
        # Orbax and TFDS log much that is of no interest here, and with a traceback what they raise.
        logging.set_verbosity(logging.FATAL)
        config = config_flag.value
        try:
            if config.distributed:
                _find_hosts(config)
            train(config, workdir_flag.value)
        except (
            ConfigError,
            FileNotFoundError,
            FloatingPointError,
            ImportError,
            MemoryError,
        ) as error:
            sys.exit(f"error: {error}")

    end_on_interrupt("interrupted; rerun the same command to resume")
    app.run(main)


def end_on_interrupt(line: str) -> None:
    """Makes Ctrl-C print a line and end the process at once, with status 130.

    Nothing is lost: a run's loop has a handler that saves. Not by KeyboardInterrupt, which
    extension modules swallow while they are imported.
    """

    def end(number: int, frame: Any) -> None:
        del number, frame
        os.write(2, f"\n{line}\n".encode())
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, end)


def _find_hosts(config: ml_collections.ConfigDict) -> None:
    """Connects to the other hosts; must come before anything else of JAX."""
    import jax

    process_id = None if config.process_id < 0 else config.process_id
    jax.distributed.initialize(config.coordinator or None, config.num_processes or None, process_id)
