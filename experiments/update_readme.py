"""Puts what the runs below `experiments/results` measured into README.md, between the markers of each table.

The runs, each of a few minutes on two CPU cores (`seconds` in its summaries); TFDS_DATA_DIR names the folder of Fashion-MNIST:

    for seed in 0 1 2; do
      python experiments/digits.py --config.seed=$seed --workdir=experiments/results/digits/seed$seed
      python experiments/fashion_mnist.py --config.seed=$seed --workdir=experiments/results/fashion_mnist/seed$seed
    done
    python experiments/update_readme.py
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common.post_training import CONSTRAINTS
from common.report import Summary, format_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"


def seeds_table(experiment: str) -> str:
    """Mean and sample standard deviation over the seeds of an experiment, a line a constraint."""
    rows = []
    for constraint in CONSTRAINTS:
        files = sorted((RESULTS / experiment).glob(f"seed*/{constraint}/summary.json"))
        summaries = [Summary(**json.loads(file.read_text())) for file in files]
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
    return format_table(("constraint", "full precision", "STE", "CBP", "CFS / scale, worst", "seeds"), rows)


def _spread(accuracies: Sequence[float]) -> str:
    return f"{100 * np.mean(accuracies):.2f} ± {100 * np.std(accuracies, ddof=1):.2f}"


def tables() -> dict[str, str]:
    """The text between each pair of markers."""
    return {
        "digits": (RESULTS / "digits" / "seed0" / "table.md").read_text().strip(),
        "digits-seeds": seeds_table("digits"),
        "fashion_mnist-seeds": seeds_table("fashion_mnist"),
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
            raise SystemExit(f"error: README.md has no markers <!-- {name}:begin --> and <!-- {name}:end -->")
    readme.write_text(text)


if __name__ == "__main__":
    main()
