"""A study: one network, pre-trained once, then post-trained in several ways from the same weights.

Every run is an ordinary one in a folder of its own. A study that was stopped resumes: finished runs
are not repeated, and the interrupted one starts from its newest checkpoint.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

import cbp_jax
from common.config import OF_STUDIES, ConfigError
from common.report import figures
from common.report.tables import results_table
from common.report.workdir import FULL_PRECISION, Summary, read_metrics
from common.training import disk
from common.training.run import log, train_and_evaluate
from common.training.settle import PRETRAINED, differences_that_count, saved_config, settle

PRETRAIN = "pretrain"
_DISTILLED = "_distilled"
FINISHED_RUNS = "the finished runs are intact, and the same command goes on after them"


class Entry(NamedTuple):
    """One run of a study."""

    name: str  # of its folder
    changes: Mapping[str, Any]  # fields in which its config differs from the study's


def entries(config: ml_collections.ConfigDict) -> list[Entry]:
    """Returns the runs that a config lists: each of its methods under each of its constraints.

    CBP's folder is named by the constraint alone, as `binary`; others as `binary_ste`. The method
    "full_precision" has no constraint, and runs once. With `distilled`, all of them run again, with
    the pre-trained weights as their teacher, in `binary_ste_distilled`.
    """
    runs = _undistilled(config)
    if config.get("distilled"):
        teacher = {"teacher": PRETRAINED}
        runs += [Entry(f"{name}{_DISTILLED}", {**changes, **teacher}) for name, changes in runs]
    return runs


def _undistilled(config: ml_collections.ConfigDict) -> list[Entry]:
    every = config.constraint == "all"
    constraints = config.get("constraints") or (
        cbp_jax.CONSTRAINTS if every else (config.constraint,)
    )
    unconstrained = [name for name in config.methods if name == "full_precision"]
    return [Entry(name, {"method": name}) for name in unconstrained] + [
        Entry(
            constraint if method == "cbp" else f"{constraint}_{method}",
            {"constraint": constraint, "method": method},
        )
        for constraint in constraints
        for method in config.methods
        if method not in unconstrained
    ]


def run(
    config: ml_collections.ConfigDict, workdir: Path, runs: Sequence[Entry] | None = None
) -> list[Summary]:
    """Pre-trains, runs what is not finished yet, and prints the table.

    Args:
      config: of the study: that of a run, with `methods`.
      workdir: of the study; each run has a folder below, `pretrain` and the names of `runs`.
      runs: what to run from the pre-trained weights; None: `entries(config)`.

    Returns:
      The summaries of `runs`.

    Raises:
      ConfigError: if a folder holds a finished run of another config.
    """
    runs = entries(config) if runs is None else runs
    base = ml_collections.ConfigDict(config.to_dict())
    for name in OF_STUDIES:
        if name in base:
            del base[name]
    base.constraint = cbp_jax.CONSTRAINTS[0]  # of no account in pre-training
    pretrain = Entry(PRETRAIN, {"phase": "pretrain"})
    from_pretrained = {"pretrained": str(workdir / PRETRAIN)}
    finish(base, workdir, pretrain)
    summaries = [
        finish(base, workdir, entry._replace(changes={**from_pretrained, **entry.changes}))
        for entry in runs
    ]
    table = results_table(summaries)
    if jax.process_index() == 0:
        with disk.explained(workdir, FINISHED_RUNS):
            (workdir / "table.md").write_text(table + "\n")
            _draw(workdir, runs, summaries)
    log(f"\n{table}\n\nwritten to {workdir}")
    return summaries


def finish(base: ml_collections.ConfigDict, workdir: Path, entry: Entry) -> Summary:
    """Runs an entry, or reads its summary if it is finished."""
    config, folder = ml_collections.ConfigDict(base.to_dict()), workdir / entry.name
    config.update(entry.changes)
    if not (folder / "summary.json").exists():
        return train_and_evaluate(config, folder)
    saved = saved_config(folder)
    changed = differences_that_count(saved, settle(config, saved))
    if shown := ", ".join(f"{name} {change}" for name, change in changed.items()):
        raise ConfigError(
            f"{folder} holds a finished run of another config (saved -> asked): {shown}; give "
            "another --workdir, or remove the folder"
        )
    log(f"{entry.name}: finished before, see {folder}")
    return Summary.read(folder)


def _draw(workdir: Path, runs: Sequence[Entry], summaries: Sequence[Summary]) -> None:
    """Draws the methods side by side, one figure per constraint, and per teacher."""
    kinds = [
        (summary.constraint, summary.distilled) for summary in summaries if summary.constrained
    ]
    for constraint, distilled in dict.fromkeys(kinds):
        found = [
            (summary, read_metrics(workdir / entry.name))
            for summary, entry in zip(summaries, runs, strict=True)
            if summary.constraint in (constraint, FULL_PRECISION) and summary.distilled == distilled
        ]
        figures.plot_training(
            workdir / "figures" / f"{constraint}{_DISTILLED if distilled else ''}.png",
            f"{summaries[0].experiment}, {constraint.replace('_', '-')} weights",
            {summary.method: rows for summary, rows in found},
            summaries[0].full_precision_top1,
        )
