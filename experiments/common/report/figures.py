"""The figures of a run, as PNG and as PDF."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator, ScalarFormatter

import cbp_jax
from common.report.workdir import METHODS, Summary, Workdir, read_metrics

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
_CBP, _STE, _FULL, _WINDOW = "#0072b2", "#d55e00", "#555555", "#009e73"
COLORS = {
    "cbp": _CBP,
    "closing": "#7a3fa0",
    "no_window": "#cc79a7",
    "ste": _STE,
    "parq": "#e69f00",
    "binary_relax": "#56b4e9",
    "rounding": "#999999",
    "full_precision": "#000000",
}
_TRIANGLES: dict[str, Any] = {"marker": "v", "linestyle": "none", "markersize": 4}
_SHARES = (1, 5, 10, 20, 30, 50, 75, 100)  # ticks of the histograms, in percent


def plot_training(
    path: Path,
    title: str,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    full_precision_top1: float,
) -> None:
    """Plots accuracy of the quantized weights above, CFS and the window below, over epochs.

    Args:
      path: of the PNG; the PDF goes beside it.
      title: of the figure.
      runs: rows of `metrics.jsonl` by method, a key of `METHODS`; in full precision without CFS.
      full_precision_top1: accuracy of the weights that all started from.
    """
    size: dict[str, Any] = {"figsize": (6, 5), "layout": "constrained"}
    with plt.rc_context(STYLE):
        figure, (top, bottom) = plt.subplots(2, 1, sharex=True, **size)
        style: dict[str, Any] = {"color": _FULL, "linestyle": "--", "linewidth": 1}
        label = "full precision, before"
        handles = [top.axhline(100 * full_precision_top1, label=label, **style)]
        # The first epochs may lie far below the range that matters.
        accuracies = 100 * _column([row for rows in runs.values() for row in rows], "top1")
        low, high = np.percentile(accuracies, 10), max(*accuracies, 100 * full_precision_top1)
        bottom_edge = low - 0.3 * (high - low) - 0.2
        top.set_ylim(bottom_edge, high + 0.1 * (high - low) + 0.2)
        for method, rows in runs.items():
            color = COLORS[method]
            style = {"color": color, "linewidth": 1.2, "marker": _marker(rows)}
            epochs, accuracy = _column(rows, "epoch"), 100 * _column(rows, "top1")
            handles += top.plot(epochs, accuracy, label=METHODS[method], **style)
            bottom.plot(epochs, _column(rows, "cfs_relative"), **style)
            _mark_below(top, epochs[accuracy < bottom_edge], bottom_edge, color)
        if (accuracies < bottom_edge).any():
            handles.append(Line2D([], [], color=_FULL, label="below the axis", **_TRIANGLES))
        top.set_ylabel("top-1 accuracy [%]")
        bottom.set_yscale("log")
        bottom.set_ylabel("CFS / scale")
        bottom.set_xlabel("epoch of the schedule")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        handles += _plot_window(bottom, runs["cbp"]) if "cbp" in runs else []
        figure.align_ylabels([top, bottom])
        figure.suptitle(title, fontsize=10)
        columns = len(handles) if len(handles) <= 5 else 4
        spacing = {"columnspacing": 1.2, "handlelength": 1.4, "handletextpad": 0.5}
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, **spacing)
        save(figure, path)


def _mark_below(axes: Axes, epochs: np.ndarray, edge: float, color: str) -> None:
    """Draws triangles on the lower edge at epochs whose accuracy is below it."""
    if len(epochs):
        edges = np.full(len(epochs), edge)
        axes.plot(epochs, edges, color=color, clip_on=False, zorder=3, **_TRIANGLES)


def _plot_window(axes: Axes, cbp: Sequence[Mapping[str, Any]]) -> list[Line2D]:
    """Plots the window g on an axis of its own, if any is finite."""
    window = _column(cbp, "window")
    if not np.isfinite(window).any():
        return []
    right = axes.twinx()
    style: dict[str, Any] = {"color": _WINDOW, "linewidth": 1, "marker": _marker(cbp)}
    lines = right.step(_column(cbp, "epoch"), window, where="mid", label="window g (CBP)", **style)
    right.set_yscale("log")
    right.set_ylabel("window g", color=_WINDOW)
    right.spines["right"].set_visible(True)
    right.grid(False)
    return lines


def _marker(rows: Sequence[Mapping[str, Any]]) -> str:
    """Marks a single point: a line through it is invisible."""
    return "o" if len(rows) == 1 else ""


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Returns one value per epoch; null, for what is not finite, or none leaves a gap."""
    return np.array([row.get(name) for row in rows], float)


def plot_weights(
    path: Path, title: str, snapshots: Mapping[str, np.ndarray], levels: Sequence[float]
) -> None:
    """Plots histograms of a layer's weights over their scale, one panel per moment, and the levels.

    All panels have the same axes. Heights are square roots of shares, so that the wide
    distribution before is visible beside the few bars after. Weights beyond the ends of the axis
    count in its last bins, and a note gives their share.

    Args:
      path: of the PNG; the PDF goes beside it.
      title: of the figure.
      snapshots: weights by moment; the first ones set the range.
      levels: of the constraint.
    """
    count = len(snapshots)
    size: dict[str, Any] = {"figsize": (2.4 * count, 2.4), "layout": "constrained"}
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, count, sharex=True, sharey=True, squeeze=False, **size)
        reach = 1.15 * max(
            *map(abs, levels), np.quantile(np.abs(next(iter(snapshots.values()))), 0.999)
        )
        bins = np.linspace(-reach, reach, 82)  # 0 is in the middle of a bin
        for panel, (moment, weights) in zip(panels[0], snapshots.items(), strict=True):
            for level in levels:
                panel.axvline(level, color=_STE, linewidth=0.8, alpha=0.6)
            counts, _ = np.histogram(np.clip(weights, -reach, reach), bins)
            panel.stairs(100 * counts / weights.size, bins, fill=True, color=_CBP)
            _note_beyond(panel, weights, reach)
            panel.set_title(moment, fontsize=9)
            panel.set_xlabel("weight / scale")
        axis = panels[0, 0]
        root = (lambda share: np.sqrt(np.maximum(share, 0)), np.square)
        axis.set_yscale("function", functions=root)
        axis.set_ylim(bottom=0)
        ticks = [tick for tick in _SHARES if tick <= axis.get_ylim()[1]]
        axis.yaxis.set_major_locator(FixedLocator(ticks))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set_ylabel("share of the weights [%]")
        figure.suptitle(title, fontsize=10)
        save(figure, path)


def _note_beyond(panel: Axes, weights: np.ndarray, reach: float) -> None:
    """Notes at each end the share of the weights beyond it."""
    style: dict[str, Any] = {"fontsize": 6.5, "color": _FULL, "va": "top"}
    for side, align, count, text in (
        (0, "left", np.sum(weights < -reach), "◂ {}\n beyond"),
        (1, "right", np.sum(weights > reach), "{} ▸\nbeyond "),
    ):
        if count:
            share = count / weights.size
            note = text.format(f"{share:.1%}" if share >= 0.0005 else "<0.1%")
            panel.text(side, 0.97, note, ha=align, transform=panel.transAxes, **style)


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.draw_without_rendering()  # lays it out, once for both files
    figure.set_layout_engine("none")
    for suffix in (".png", ".pdf"):
        figure.savefig(path.with_suffix(suffix))
    plt.close(figure)


def draw_run(
    folder: Workdir, summary: Summary, after: Mapping[str, np.ndarray], midway: str | None
) -> None:
    """Draws a run's figures: accuracy and CFS over epochs, and the weights of each layer.

    Args:
      folder: of the run, with its metrics and the weights of earlier moments.
      summary: of the run.
      after: the weights at the end, by layer, in units of their scale.
      midway: the title of the moment midway; None if there was none.
    """
    title = f"{summary.experiment}, {summary.constraint.replace('_', '-')} weights"
    runs = {summary.method: read_metrics(folder.path)}
    path = folder.path / "figures"
    plot_training(path / "training.png", title, runs, summary.full_precision_top1)
    moments = {}
    for moment, shown in {"before": "before", "midway": midway and f"midway: {midway}"}.items():
        try:
            if shown:
                moments[shown] = folder.load_weights(moment)
        except (OSError, ValueError) as error:
            warnings.warn(f"the histograms lack the weights {moment}: {error}", stacklevel=2)
    moments["after"] = dict(after)
    levels = cbp_jax.get_constraint(summary.constraint).levels
    for layer in after:
        snapshots = {shown: kept[layer] for shown, kept in moments.items() if layer in kept}
        name = f"weights_{layer.replace('/', '_')}.png"
        plot_weights(path / name, f"{title}: {layer}", snapshots, levels)
