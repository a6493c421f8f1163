"""What multipliers and their optimizer keep, and what keeping less does to accuracy.

    cd experiments && python -m benchmarks.multiplier_state --experiment=digits
    cd experiments && TFDS_DATA_DIR=DIR python -m benchmarks.multiplier_state \\
        --experiment=fashion_mnist

For each seed a study: the network is pre-trained once, and from there every constraint is trained
with every setting. Copies are the bytes of multipliers and moments over those of the constrained
weights in float32. The studies are below `--workdir`, and resume; the results are written to
`results/multiplier_state_EXPERIMENT.json` and `.md`.
"""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import digits
import fashion_mnist
import jax
from absl import app, flags
from benchmarks import timing
from common import study
from common.report.tables import format_table
from common.report.workdir import read_metrics
from common.training.restore import restore

import cbp_jax

EXPERIMENTS = {"digits": digits, "fashion_mnist": fashion_mnist}
SETTINGS = {
    "Adam, float32": {"multiplier_rule": "adam", "multiplier_dtype": "float32"},
    "capped, bfloat16": {"multiplier_rule": "capped", "multiplier_dtype": "bfloat16"},
}

_EXPERIMENT = flags.DEFINE_enum("experiment", "digits", list(EXPERIMENTS), "Whose runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/multiplier_state", "Folder of the studies.")


def copies(opt_state: Any) -> float:
    """Returns the size of multipliers and moments, in float32 copies of the constrained weights."""
    state = opt_state.cbp
    leaves = jax.tree.leaves((state.multipliers, state.multiplier_opt_state))
    kept = sum(leaf.nbytes for leaf in leaves if leaf.ndim)
    return kept / sum(4 * leaf.size for leaf in jax.tree.leaves(state.multipliers))


def measure() -> list[dict[str, Any]]:
    """Returns the last epoch of every run."""
    entries, rows = [], []
    for constraint in cbp_jax.CONSTRAINTS:
        for setting, changes in SETTINGS.items():
            name = f"{constraint}_{changes['multiplier_rule']}"
            about = {"constraint": constraint, "setting": setting}
            entries.append((study.Entry(name, {"constraint": constraint, **changes}), about))
    for seed in range(_SEEDS.value):
        config = EXPERIMENTS[_EXPERIMENT.value].get_config()
        config.seed = seed
        workdir = Path(_WORKDIR.value) / _EXPERIMENT.value / f"seed{seed}"
        study.run(config, workdir, [entry for entry, _ in entries])
        for entry, about in entries:
            last = read_metrics(workdir / entry.name)[-1]
            kept = copies(restore(workdir / entry.name).state.opt_state)
            row = {**about, "seed": seed, "copies": kept}
            rows.append(row | {name: last[name] for name in ("top1", "cfs_relative", "window")})
    return rows


def as_markdown(results: Mapping[str, Any]) -> str:
    """The results as a page."""
    cells = []
    for constraint in dict.fromkeys(run["constraint"] for run in results["runs"]):
        for setting in dict.fromkeys(run["setting"] for run in results["runs"]):
            runs = [
                run
                for run in results["runs"]
                if (run["constraint"], run["setting"]) == (constraint, setting)
            ]
            top1 = [100 * run["top1"] for run in runs]
            spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
            cells.append(
                (
                    constraint,
                    setting,
                    f"{runs[0]['copies']:.2f}",
                    f"{statistics.mean(top1):.2f} ± {spread:.2f}",
                    f"{max(run['cfs_relative'] for run in runs):.1e}",
                )
            )
    table = format_table(
        ("constraint", "multipliers", "copies", "top-1, %", "CFS / scale, worst"), cells
    )
    return (
        f"# What the multipliers keep: {results['experiment']}\n"
        f"Mean and standard deviation over {results['seeds']} seeds, {timing.described(results)}. "
        "Copies: bytes of multipliers and their moments over those of the constrained weights in "
        "float32. By `python -m benchmarks.multiplier_state "
        f"--experiment={results['experiment']}`.\n\n{table}\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    results = timing.environment() | {
        "experiment": _EXPERIMENT.value,
        "seeds": _SEEDS.value,
        "runs": measure(),
    }
    timing.write(f"multiplier_state_{_EXPERIMENT.value}", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
