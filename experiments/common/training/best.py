"""The best state of a run, in a workdir of its own beside the newest: `WORKDIR/best`."""

import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from common.report.workdir import replace_text
from common.training import disk
from common.training.checkpoints import AnotherTreeError, Checkpoints
from common.training.restore import Record, save_state
from common.training.step import TrainState

FOLDER = "best"
_FIGURES = ("epoch", "step", "top1", "eval_loss", "cfs_relative")


class Best:
    """Keeps the state of the epoch whose evaluation was best: by top-1 accuracy, of text by loss.

    Under a method whose multipliers bring the weights to their levels, an epoch counts only if
    CFS / scale is `config.best_cfs` or less. The figures of the best stand in its checkpoint, so
    that no kill parts them.

    Args:
      workdir: of the run.
      config: of the run.
      resumes: whether the run does; a new one removes what is there.
    """

    def __init__(self, workdir: Path, config: ml_collections.FrozenConfigDict, resumes: bool):
        self.figures: dict[str, Any] | None = None  # of the best so far, as in `metrics.jsonl`
        self._config, self._folder = config, workdir / FOLDER
        if jax.process_index() == 0:
            if not resumes and self._folder.exists():
                shutil.rmtree(self._folder)
            self._folder.mkdir(exist_ok=True)
            replace_text(self._folder / "config.json", config.to_json_best_effort(indent=2) + "\n")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("best")
        self._checkpoints = Checkpoints(self._folder / "checkpoints", keep=1)

    def restore(self, like: TrainState) -> None:
        """Finds the best of earlier processes; one that cannot be read is put aside with a warning.

        Args:
          like: a state of the run.
        """
        weights = {"params": like.params, "batch_stats": like.batch_stats}
        weights = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), weights)
        try:
            found = self._checkpoints.restore_newest({"weights": weights})
        except AnotherTreeError:
            raise
        except ValueError as error:
            warnings.warn(f"{error}; the next epoch that counts is the best", stacklevel=2)
            self._checkpoints.put_aside(self._checkpoints.steps())
        else:
            self.figures = found[2]["best"] if found else None

    def offer(self, state: TrainState, record: Record, row: Mapping[str, Any]) -> None:
        """Saves a state in the background if it is better than the best so far.

        Args:
          state: after an epoch's last step; the caller has seen that it is finite.
          record: of the run.
          row: of `epoch_row`.
        """
        if not self._counts(row):
            return
        if self.figures is not None and self._score(row) <= self._score(self.figures):
            return
        self.figures = {name: row[name] for name in _FIGURES if name in row}
        # Later ones are of a run that was resumed from before them, with other settings. They go
        # first: Orbax counts by steps. A kill in between repeats this epoch's evaluation.
        self._checkpoints.discard(
            [step for step in self._checkpoints.steps() if step >= row["step"]]
        )
        disk.check_space(self._folder, state)
        save_state(self._checkpoints, state, record._replace(best=self.figures))

    def wait(self) -> None:
        """Waits until it is written; before a later checkpoint, from which the run would resume."""
        self._checkpoints.wait()

    def close(self) -> None:
        """Waits until it is written, then closes the checkpoints."""
        self._checkpoints.close()

    def _counts(self, row: Mapping[str, Any]) -> bool:
        on_levels = "window" not in row or row["cfs_relative"] <= self._config.best_cfs
        return on_levels and math.isfinite(row["eval_loss"])

    def _score(self, row: Mapping[str, Any]) -> float:
        return -row["eval_loss"] if self._config.data == "text" else row["top1"]
