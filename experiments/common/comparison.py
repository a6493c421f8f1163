"""A comparison of methods: each is tuned alike on validation data, then run with several seeds.

Every cell is an ordinary run in a folder of its own, `CONSTRAINT/METHOD/trialN` and
`CONSTRAINT/METHOD/seedN`, so that a comparison that was stopped resumes. `chosen.json` beside them
says which trial was the best.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from common import study
from common.report.workdir import Summary
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
    """
    for seed in range(comparison.seeds):
        _pretrain(comparison, workdir, seed)
    for method in comparison.trials:
        best = choose(comparison, workdir, method)
        changes = comparison.trials[method][best]
        _keep_as_first_seed(workdir / comparison.tuned_on / method, best)
        # The weights that go on in full precision have no constraint.
        every = (comparison.tuned_on,) if method == "full_precision" else comparison.constraints
        for constraint in every:
            for seed in range(comparison.seeds):
                _cell(comparison, workdir, constraint, method, f"seed{seed}", seed, changes)


def choose(comparison: Comparison, workdir: Path, method: str) -> int:
    """Runs a method's trials, and returns which one is the best on the validation data."""
    found = [
        (_cell(comparison, workdir, comparison.tuned_on, method, f"trial{n}", 0, changes), changes)
        for n, changes in enumerate(comparison.trials[method])
    ]
    sign = -1 if comparison.better == "eval_loss" else 1

    def score(summary: Summary) -> float:
        return sign * float(getattr(summary, comparison.better))

    best = max(range(len(found)), key=lambda n: score(found[n][0]))
    record = {
        "chosen": best,
        "by": comparison.better,
        "trials": [
            {**changes, comparison.better: getattr(summary, comparison.better)}
            for summary, changes in found
        ],
    }
    if jax.process_index() == 0:
        file = workdir / comparison.tuned_on / method / "chosen.json"
        file.write_text(json.dumps(record, indent=2) + "\n")
    log(f"{method}: trial {best} of {len(found)}, {found[best][1]}")
    return best


def _keep_as_first_seed(folder: Path, trial: int) -> None:
    """Copies a trial: trials have seed 0, so that it is the run of this seed."""
    source, target = folder / f"trial{trial}", folder / "seed0"
    if jax.process_index() == 0 and not (target / "summary.json").exists():
        shutil.copytree(source, target, dirs_exist_ok=True)


def _pretrain(comparison: Comparison, workdir: Path, seed: int) -> None:
    """Pre-trains the network of a seed, unless the config names weights that exist."""
    if not comparison.base.pretrained:
        changes = {"phase": "pretrain", "seed": seed}
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
