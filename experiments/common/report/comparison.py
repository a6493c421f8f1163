"""Tables and figures of a comparison of methods, from what its runs left."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import cbp_jax
from common.report.figures import COLORS, STYLE, save
from common.report.tables import format_table
from common.report.workdir import METHODS, Summary, read_metrics

FULL_PRECISION = "full_precision"


class Cell(NamedTuple):
    """The runs of one method under one constraint, a seed each."""

    constraint: str
    method: str
    summaries: Sequence[Summary]
    folders: Sequence[Path]


class Difference(NamedTuple):
    """Of two cells that share seeds, in the unit of `result`."""

    mean: float
    error: float  # standard error of the mean; nan of one seed

    @property
    def sign(self) -> int:
        """1 or -1 if it is larger than two standard errors, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > 2 * self.error else 0

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


def difference(a: Cell, b: Cell) -> Difference:
    """Returns a - b, paired by seed: runs of one seed start from the same weights."""
    of_b = {summary.seed: result(summary) for summary in b.summaries}
    values = [result(s) - of_b[s.seed] for s in a.summaries if s.seed in of_b]
    error = float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return Difference(float(np.mean(values)), error)


def cells(folder: Path) -> dict[tuple[str, str], Cell]:
    """Returns the finished cells of a comparison by constraint and method, in METHODS' order."""
    order, found = [*METHODS], {}
    runs = [file.parent for file in sorted(folder.glob("*/*/seed*/summary.json"))]
    paths = sorted({run.parent for run in runs}, key=lambda path: (_rank(path.name, order), path))
    for path in paths:
        constraint, method = path.parent.name, path.name
        mine = [run for run in runs if run.parent == path]
        found[constraint, method] = Cell(constraint, method, list(map(Summary.read, mine)), mine)
    return found


def _rank(name: str, order: Sequence[str]) -> int:
    """Methods come in their order, and what a study names itself after them."""
    return order.index(name) if name in order else len(order)


def result(summary: Summary) -> float:
    """The figure that a comparison reports: accuracy on the test set in percent, or nats a byte."""
    if summary.experiment == "shakespeare_llama":
        return float(summary.eval_loss if summary.test_loss is None else summary.test_loss)  # type: ignore[arg-type]
    return 100 * (summary.top1 if summary.test_top1 is None else summary.test_top1)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Returns mean and sample deviation; of one value, that alone."""
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def results_table(folder: Path) -> str:
    """One row per method, one column per constraint: mean and deviation over the seeds."""
    found = cells(folder)
    constraints = sorted({c for c, _ in found}, key=cbp_jax.CONSTRAINTS.index)
    rows = []
    for method in dict.fromkeys(method for _, method in found):
        row = [found.get((constraint, method)) for constraint in constraints]
        runs = [summary for cell in row if cell for summary in cell.summaries]
        digits = 3 if runs[0].experiment == "shakespeare_llama" else 2
        seeds = sorted({len(cell.summaries) for cell in row if cell})
        rows.append(
            [
                METHODS.get(method, method.replace("_", " ")),
                *(
                    spread(list(map(result, cell.summaries)), digits) if cell else ""
                    for cell in row
                ),
                "" if method == FULL_PRECISION else f"{max(s.cfs_relative for s in runs):.1e}",
                f"{np.mean([s.seconds for s in runs]):.0f}",
                f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
            ]
        )
    header = ["method", *constraints, "CFS / scale, worst", "seconds a run", "seeds"]
    return format_table(header, rows)


def tuning_table(folder: Path) -> str:
    """One row per method: how many trials, what they chose, and its figure on validation data."""
    rows = []
    for method in METHODS:
        for file in sorted(folder.glob(f"*/{method}/chosen.json")):
            record = json.loads(file.read_text())
            trials, by = record["trials"], record["by"]
            best = trials[record["chosen"]]
            scores = [trial[by] for trial in trials if trial[by] is not None]
            settings = ", ".join(f"{name} {value}" for name, value in best.items() if name != by)
            shown: Callable[[float], str] = (
                (lambda score: f"{score:.3f}")
                if by == "eval_loss"
                else (lambda score: f"{score:.2%}")
            )
            spread_of_trials = f"{shown(min(scores))} to {shown(max(scores))}"
            if diverged := len(trials) - len(scores):
                spread_of_trials += f", {diverged} diverged"
            rows.append(
                [METHODS[method], str(len(trials)), settings, shown(best[by]), spread_of_trials]
            )
    header = ["method", "trials", "chosen", "on validation data", "all trials"]
    return format_table(header, rows)


def plot_accuracy_against_bits(path: Path, title: str, folder: Path) -> None:
    """Plots each method's mean over bits a weight, with the deviation over the seeds."""
    found = cells(folder)
    methods = [
        m for m in dict.fromkeys(m for _, m in found) if m not in (FULL_PRECISION, "rounding")
    ]
    shown = [c for c in cbp_jax.CONSTRAINTS if any(c == of for of, _ in found)]
    order = {constraint: index for index, constraint in enumerate(shown)}
    bits = {constraint: cbp_jax.get_constraint(constraint).bits for constraint in shown}
    names = [f"{c.replace('_', ' ')}\n{n} bit{'s' if n > 1 else ''}" for c, n in bits.items()]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
        for index, method in enumerate(methods):
            mine = sorted(
                (cell for (_, m), cell in found.items() if m == method),
                key=lambda cell: order[cell.constraint],
            )
            values = [list(map(result, cell.summaries)) for cell in mine]
            x = [order[cell.constraint] + 0.06 * (index - len(methods) / 2) for cell in mine]
            deviations = [float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for v in values]
            axes.errorbar(
                x, [np.mean(v) for v in values], deviations, color=COLORS[method],
                label=METHODS[method], marker="o", markersize=4, capsize=2, linewidth=1,
            )  # fmt: skip
        full = [cell for (_, method), cell in found.items() if method == FULL_PRECISION]
        if full:
            mean = float(np.mean([result(summary) for summary in full[0].summaries]))
            label = "full precision, trained on"
            axes.axhline(
                mean, color=COLORS[FULL_PRECISION], linestyle="--", linewidth=1, label=label
            )
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(_result_label(found))
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8)
        save(figure, path)


def plot_over_steps(path: Path, title: str, folder: Path, constraint: str) -> None:
    """Plots validation figure and CFS over steps: the mean of the seeds, and all between them."""
    found = cells(folder)
    text = next(iter(found.values())).summaries[0].experiment == "shakespeare_llama"
    name, factor = ("eval_loss", 1.0) if text else ("top1", 100.0)
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(
            2, 1, sharex=True, figsize=(6, 5), layout="constrained"
        )
        ends = []
        for (of, method), cell in found.items():
            if method in ("rounding", "binary_relax") or of not in (constraint,):
                continue
            rows = [read_metrics(run) for run in cell.folders]
            if not all(rows):
                continue
            steps = [row["step"] for row in rows[0]]
            style: Mapping[str, Any] = {"color": COLORS[method], "linewidth": 1.2}
            for axes, field, scale in ((top, name, factor), (bottom, "cfs_relative", 1.0)):
                if field not in rows[0][0]:
                    continue
                values = np.array([[scale * row[field] for row in run] for run in rows])
                axes.plot(steps, values.mean(0), label=METHODS[method], **style)
                low, high = values.min(0), values.max(0)
                axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
                if axes is top:
                    ends += [*values[:, len(steps) // 4 :].ravel()]
        low, high = np.percentile(ends, 5), np.max(ends)
        if text:
            low, high = np.min(ends), np.percentile(ends, 95)
        top.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        top.set_ylabel("validation loss [nats/byte]" if text else "validation accuracy [%]")
        bottom.set_yscale("log")
        bottom.set_ylabel("CFS / scale")
        bottom.set_xlabel("step")
        top.set_title(title, fontsize=10)
        handles, labels = top.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=4)
        save(figure, path)


def _result_label(found: Mapping[tuple[str, str], Cell]) -> str:
    text = next(iter(found.values())).summaries[0].experiment == "shakespeare_llama"
    return "test loss [nats/byte]" if text else "test accuracy [%]"
