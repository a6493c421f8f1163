"""What the multipliers and their optimizer keep, and what keeping less does to accuracy: whole
digits and Fashion-MNIST runs.

    cd experiments && python -m benchmarks.multiplier_state --experiment=digits
    cd experiments && TFDS_DATA_DIR=DIR python -m benchmarks.multiplier_state
    --experiment=fashion_mnist

For each seed the network is pre-trained once; from there every constraint is trained with every
setting. Copies are the bytes of multipliers and moments over those of the constrained weights in
float32. Writes `results/multiplier_state_EXPERIMENT.json` and `.md`.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import digits
import fashion_mnist
import jax
from absl import app, flags
from benchmarks import timing
from common import post_training
from common.report.workdir import format_table

EXPERIMENTS = {"digits": digits, "fashion_mnist": fashion_mnist}
SETTINGS = {
    "Adam, float32": ("adam", "float32"),
    "capped, bfloat16": ("capped", "bfloat16"),
}

_EXPERIMENT = flags.DEFINE_enum("experiment", "digits", list(EXPERIMENTS), "Whose runs.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each.")


def copies(opt_state: Any) -> float:
    """Multipliers and moments, in float32 copies of the constrained weights."""
    state = opt_state.cbp
    kept = sum(
        leaf.nbytes
        for leaf in jax.tree.leaves((state.multipliers, state.multiplier_opt_state))
        if leaf.ndim
    )
    return kept / sum(4 * leaf.size for leaf in jax.tree.leaves(state.multipliers))


def measure() -> list[dict[str, Any]]:
    """A row a run: the last epoch of each."""
    experiment, rows = EXPERIMENTS[_EXPERIMENT.value], []
    for seed in range(_SEEDS.value):
        config = experiment.get_config()
        config.seed = seed
        job, params, batch_stats = post_training.make_job(
            _EXPERIMENT.value,
            config,
            experiment.make_dataset(config),
            experiment.make_model(config),
        )
        pretrained, _ = post_training.pretrain(job, params, batch_stats)
        for constraint in post_training.CONSTRAINTS:
            for setting, (rule, dtype) in SETTINGS.items():
                config.multiplier_rule, config.multiplier_dtype = rule, dtype
                optimizer = post_training.cbp_optimizer(job, constraint)
                outcome = post_training.post_train(
                    job, pretrained, optimizer, f"{constraint}, {setting}", lambda row: 0.0
                )
                last = outcome.rows[-1]
                row = {
                    "constraint": constraint,
                    "setting": setting,
                    "seed": seed,
                    "copies": copies(outcome.state.opt_state),
                }
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
        f"Mean and standard deviation over {results['seeds']} seeds, {timing.described(results)}. Copies: bytes "
        "of multipliers and their moments over those of the constrained weights in float32. By "
        f"`python -m benchmarks.multiplier_state --experiment={results['experiment']}`.\n\n{table}\n"
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
