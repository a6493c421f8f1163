"""Puts what the runs below `experiments/results` measured into README.md, between the markers of
each table.

The runs, on two CPU cores (`seconds` in the summaries says how long each takes); TFDS_DATA_DIR
names the folder of Fashion-MNIST and CIFAR-10:

    for seed in 0 1 2; do
      python experiments/digits.py --config.seed=$seed
      --workdir=experiments/results/digits/seed$seed python experiments/fashion_mnist.py
      --config.seed=$seed --workdir=experiments/results/fashion_mnist/seed$seed
    done
    run() { python experiments/cifar10_resnet20.py --workdir=experiments/results/cifar10_resnet20/$1
    "${@:2}"; } run pretrain --config.phase=pretrain --config.steps_per_epoch=100
    --config.pretrain_epochs=12 --config.warmup_epochs=2 run binary
    --config.pretrained=experiments/results/cifar10_resnet20/pretrain --config.constraint=binary \\
        --config.steps_per_epoch=50 --config.epochs=40 --config.patience=1
        --config.multiplier_learning_rate=3e-3
    (cd experiments && python -m benchmarks)   # on a machine that does nothing else
    (cd experiments && python -m benchmarks.closing)
    python experiments/update_readme.py
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from benchmarks import closing, page, timing
from common.post_training import CONSTRAINTS
from common.report.workdir import Summary, Workdir, format_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


def seeds_table(experiment: str) -> str:
    """Mean and sample standard deviation over the seeds of an experiment, a line a constraint."""
    rows = []
    for constraint in CONSTRAINTS:
        files = sorted((RESULTS / experiment).glob(f"seed*/{constraint}/summary.json"))
        summaries = [Summary.read(file.parent) for file in files]
        rows.append(
            (
                constraint,
                _spread([s.full_precision_top1 for s in summaries]),
                _spread([s.ste_top1 for s in summaries if s.ste_top1 is not None]),
                _spread([s.top1 for s in summaries]),
                f"{max(s.cfs_relative for s in summaries):.1e}",
                str(len(summaries)),
            )
        )
    return format_table(
        ("constraint", "full precision", "STE", "CBP", "CFS / scale, worst", "seeds"), rows
    )


def _spread(accuracies: Sequence[float]) -> str:
    return f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"


def short_run_table(experiment: str) -> str:
    """A line a run of a long experiment that was cut short: accuracy, and how the constraint closed."""
    rows = []
    for file in sorted((RESULTS / experiment).glob("*/summary.json")):
        summary = Summary.read(file.parent)
        config = json.loads((file.parent / "config.json").read_text())
        if config["phase"] == "post_train":
            epochs = Workdir.rows(file.parent)
            rows.append(
                (
                    summary.constraint,
                    config["method"].upper(),
                    f"{summary.full_precision_top1:.2%}",
                    f"{summary.top1:.2%}",
                    f"{epochs[0]['cfs_relative']:.1e}",
                    f"{summary.cfs_relative:.1e}",
                    f"{epochs[-1]['step']:,} of {config['batch_size']} images",
                )
            )
    header = (
        "constraint",
        "method",
        "top-1 before",
        "after",
        "CFS / scale, first epoch",
        "last epoch",
        "steps",
    )
    return format_table(header, rows)


# What the advice on settings rests on: optimizer, multiplier rate, growth of the window; binary
# weights.
_ADVICE = (
    ("SGD, constant", 0.0, ""),
    ("SGD, constant", 1e-3, "+10"),
    ("SGD, constant", 1e-2, "+10"),
    ("SGD, cosine", 1e-4, "+10"),
    ("SGD, cosine", 1e-3, "+10"),
    ("SGD, cosine", 1e-3, "×1.5"),
    ("AdamW, cosine", 0.0, ""),
    ("AdamW, cosine", 1e-3, "×1.5"),
)


def advice_table() -> str:
    """The rows of the `closing` benchmark that README's advice on settings refers to."""
    rows = json.loads((timing.RESULTS / "closing.json").read_text())["runs"]
    found = {
        (row["optimizer"], row["rate"], row["growth"]): row
        for row in rows
        if row["constraint"] == "binary"
    }
    return closing.table([found[key] for key in _ADVICE])


def tables() -> dict[str, str]:
    """The text between each pair of markers."""
    return {
        "digits": (RESULTS / "digits" / "seed0" / "table.md").read_text().strip(),
        "digits-seeds": seeds_table("digits"),
        "fashion_mnist-seeds": seeds_table("fashion_mnist"),
        "cifar10_resnet20": short_run_table("cifar10_resnet20"),
        "closing": advice_table(),
        "cost": page.aims(),
    }


def between(name: str) -> re.Pattern[str]:
    """The text between the markers of a table, as group 1."""
    return re.compile(rf"(?<=<!-- {name}:begin -->\n)(.*?)\n?(?=<!-- {name}:end -->)", re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, table in tables().items():
        text, found = between(name).subn(lambda _, table=table: table + "\n", text)  # type: ignore[misc]
        if not found:
            raise SystemExit(
                f"error: README.md has no markers <!-- {name}:begin --> and <!-- {name}:end -->"
            )
    readme.write_text(text)


if __name__ == "__main__":
    main()
