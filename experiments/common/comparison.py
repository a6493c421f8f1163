"""A comparison of methods: each is tuned alike on validation data, then run with several seeds.

Every cell is an ordinary run in a folder of its own, `CONSTRAINT/METHOD/trialN` and
`CONSTRAINT/METHOD/seedN`, so that a comparison that was stopped resumes. `chosen.json` beside them
says which trial was the best.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.experimental import multihost_utils

from common import study
from common.report.workdir import Summary
from common.training import disk
from common.training.run import log

Changes = Mapping[str, Any]  # values by field of a config


class Comparison(NamedTuple):
    """What to compare, on one network and data set."""

    base: ml_collections.ConfigDict  # of a run
    constraints: Sequence[str]
    tuned_on: str  # the constraint whose trials choose the settings for all
    # By method; a name of the study's own needs trials that have the field `method`.
    trials: Mapping[str, Sequence[Changes]]
    seeds: int
    better: str  # the figure of a summary that chooses: top1 or eval_loss


def run(comparison: Comparison, workdir: Path) -> None:
    """Runs what is not finished yet: pre-training, trials, and seeds of each method's best trial.

    Raises:
      ConfigError: if a folder holds a finished run of another config.
      FloatingPointError: if all trials of a method diverge, or a seed of the best one.
    """
    for seed in range(comparison.seeds):
        _pretrain(comparison, workdir, seed)
    for method in comparison.trials:
        best = choose(comparison, workdir, method)
        changes = comparison.trials[method][best]
        # The weights that go on in full precision have no constraint.
        every = (comparison.tuned_on,) if method == "full_precision" else comparison.constraints
        if comparison.tuned_on in every:
            _keep_as_first_seed(workdir / comparison.tuned_on / method, best)
        for constraint in every:
            for seed in range(comparison.seeds):
                _cell(comparison, workdir, constraint, method, f"seed{seed}", seed, changes)


def choose(comparison: Comparison, workdir: Path, method: str) -> int:
    """Runs a method's trials, and returns which one is the best on the validation data."""
    scores = [_score(comparison, workdir, method, n) for n in range(len(comparison.trials[method]))]
    finite = [n for n, score in enumerate(scores) if score is not None]
    if not finite:
        raise FloatingPointError(
            f"each of the {len(scores)} trials of {method} diverged: try lower learning rates"
        )
    sign = -1 if comparison.better == "eval_loss" else 1
    best = max(finite, key=lambda n: sign * scores[n])  # type: ignore[operator]
    record = {
        "chosen": best,
        "by": comparison.better,
        "trials": [
            {**changes, comparison.better: score}
            for changes, score in zip(comparison.trials[method], scores, strict=True)
        ],
    }
    if jax.process_index() == 0:
        file = workdir / comparison.tuned_on / method / "chosen.json"
        with disk.explained(workdir, study.FINISHED_RUNS):
            file.write_text(json.dumps(record, indent=2) + "\n")
    log(f"{method}: trial {best} of {len(scores)}, {comparison.trials[method][best]}")
    return best


def _score(comparison: Comparison, workdir: Path, method: str, trial: int) -> float | None:
    """The figure of a trial; None if it diverged."""
    changes, name = comparison.trials[method][trial], f"trial{trial}"
    try:
        summary = _cell(comparison, workdir, comparison.tuned_on, method, name, 0, changes)
    except FloatingPointError as error:
        log(f"{method}: trial {trial} diverged: {error}")
        return None
    score = float(getattr(summary, comparison.better))
    return score if math.isfinite(score) else None


def _keep_as_first_seed(folder: Path, trial: int) -> None:
    """Copies a trial, which is the run of seed 0; its summary comes last, as in a run."""
    source, target = folder / f"trial{trial}", folder / "seed0"
    if jax.process_index() == 0 and not (target / "summary.json").exists():
        shutil.rmtree(target, ignore_errors=True)
        ignored = shutil.ignore_patterns("summary.json", "checkpoints", "tensorboard")
        with disk.explained(folder, study.FINISHED_RUNS):
            shutil.copytree(source, target, ignore=ignored)
            shutil.copy(source / "summary.json", target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("first seed")


def _pretrain(comparison: Comparison, workdir: Path, seed: int) -> None:
    """Pre-trains the network of a seed, unless the config names weights that exist."""
    if not comparison.base.pretrained:
        # The others are of no account in pre-training, so that studies may share its folder.
        changes = {"phase": "pretrain", "seed": seed, "teacher": "", "constrained": ""}
        study.finish(comparison.base, workdir, study.Entry(f"pretrain/seed{seed}", changes))


def _cell(
    comparison: Comparison,
    workdir: Path,
    constraint: str,
    method: str,
    name: str,
    seed: int,
    changes: Changes,
) -> Summary:
    base = comparison.base
    weights = base.pretrained or str(workdir / "pretrain" / f"seed{seed}")
    fields = {"constraint": constraint, "method": method, "seed": seed, "pretrained": weights}
    entry = study.Entry(f"{constraint}/{method}/{name}", {**fields, **changes})
    return study.finish(base, workdir, entry)
