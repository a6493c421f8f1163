"""The figures of a run, as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

_STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_CBP, _STE, _FULL, _WINDOW = "#0072b2", "#d55e00", "#555555", "#009e73"


def plot_training(
    path: Path, title: str, cbp: Sequence[Mapping[str, Any]], ste: Sequence[Mapping[str, Any]], full_precision_top1: float
) -> None:
    """Accuracy of the quantized weights above, CFS and the window below, over epochs."""
    with plt.rc_context(_STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6, 5), layout="constrained")
        top.axhline(100 * full_precision_top1, color=_FULL, linestyle="--", linewidth=1, label="full precision, before")
        for rows, color, label in ((ste, _STE, "STE"), (cbp, _CBP, "CBP")):
            if rows:
                top.plot(_column(rows, "epoch"), 100 * _column(rows, "top1"), color=color, linewidth=1.2, label=label)
                bottom.plot(_column(rows, "epoch"), _column(rows, "cfs_relative"), color=color, linewidth=1.2)
        # The first epochs may be far below everything that matters.
        accuracies = 100 * _column([*cbp, *ste], "top1")
        low, high = np.percentile(accuracies, 10), max(*accuracies, 100 * full_precision_top1)
        top.set_ylim(low - 0.3 * (high - low) - 0.2, high + 0.1 * (high - low) + 0.2)
        top.set_ylabel("top-1 accuracy [%]")

        bottom.set_yscale("log")
        bottom.set_ylabel("CFS / scale")
        bottom.set_xlabel("epoch of the schedule")
        right = bottom.twinx()
        right.step(_column(cbp, "epoch"), _column(cbp, "window"), where="mid", color=_WINDOW, linewidth=1, label="window g (CBP)")
        right.set_yscale("log")
        right.set_ylabel("window g", color=_WINDOW)
        right.spines["right"].set_visible(True)
        right.grid(False)
        figure.align_ylabels([top, bottom])
        figure.suptitle(title, fontsize=10)
        figure.legend(handles=[*top.get_lines(), *right.get_lines()], loc="outside lower center", ncols=4)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """One figure of every epoch; null, which is what was not finite, leaves a gap."""
    return np.array([row[name] for row in rows], float)


def plot_weights(path: Path, title: str, snapshots: Mapping[str, np.ndarray], levels: Sequence[float]) -> None:
    """Histograms of one layer's weights in units of their scale, one panel a moment, with the levels marked."""
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, len(snapshots), sharex=True, figsize=(2.4 * len(snapshots), 2.4), layout="constrained")
        reach = 1.15 * max(*map(abs, levels), np.quantile(np.abs(snapshots["before"]), 0.999))  # those beyond pile up at the ends
        bins = np.linspace(-reach, reach, 82)  # 0 is in the middle of a bin
        for panel, (moment, weights) in zip(np.atleast_1d(panels), snapshots.items(), strict=True):
            for level in levels:
                panel.axvline(level, color=_STE, linewidth=0.8, alpha=0.6)
            share = np.full(weights.size, 100 / weights.size)
            panel.hist(np.clip(weights, -reach, reach).ravel(), bins=bins, weights=share, color=_CBP)
            panel.set_title(moment, fontsize=9)
            panel.set_xlabel("weight / scale")
        np.atleast_1d(panels)[0].set_ylabel("share of the weights [%]")
        figure.suptitle(title, fontsize=10)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
        plt.close(figure)
