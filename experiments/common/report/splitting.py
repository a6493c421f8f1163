"""The figure of a layer's weights as they split onto their levels."""

import re
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import cbp_jax
from common.report.figures import STYLE, save
from common.report.workdir import METHODS

_SHOWN = 150  # weights of the layer, evenly spaced
_STEP = re.compile(r"weights_step(\d+)\.npz")


def weights_over_steps(workdir: Path, layer: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads what `config.keep_weights` kept.

    Returns:
      Steps, shape=(n,), and the layer's latent weights in units of their scale, shape=(n, size).

    Raises:
      FileNotFoundError: if the run kept none.
    """
    found = {int(match[1]): path for path in workdir.iterdir() if (match := _STEP.match(path.name))}
    if not found:
        raise FileNotFoundError(f"{workdir} has no weights_stepN.npz: run with keep_weights")
    steps = sorted(found)
    rows = []
    for step in steps:
        with np.load(found[step]) as kept:
            rows.append(kept[layer].ravel())
    return np.array(steps), np.stack(rows)


def plot_splitting(
    path: Path, title: str, runs: Mapping[str, Path], layer: str, constraint: str
) -> None:
    """Plots latent weights over steps, a panel per method, and how they lie at the end.

    Colours are the levels that the weights are quantized to in the end.

    Args:
      path: of the PNG; the PDF goes beside it.
      title: of the figure.
      runs: workdirs by method, a key of METHODS.
      layer: path of its weights.
      constraint: of all runs.
    """
    of = cbp_jax.get_constraint(constraint)
    levels = np.array(of.levels)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(levels)))
    reach = 2.2 * float(np.max(np.abs(levels)))
    bins = np.linspace(-reach, reach, 89)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, 2 * len(runs), sharey=True, squeeze=False, layout="constrained",
            figsize=(3.2 * len(runs), 2.9), width_ratios=[4, 1] * len(runs),
        )  # fmt: skip
        for index, (method, workdir) in enumerate(runs.items()):
            steps, weights = weights_over_steps(workdir, layer)
            nearest = np.abs(weights[-1][:, None] - levels).argmin(1)
            over_steps, at_end = panels[0, 2 * index : 2 * index + 2]
            for weight in range(0, weights.shape[1], max(1, weights.shape[1] // _SHOWN)):
                color = colors[nearest[weight]]
                over_steps.plot(steps, weights[:, weight], color=color, linewidth=0.5, alpha=0.5)
            over_steps.set_title(METHODS[method], fontsize=9)
            over_steps.set_xlabel("step")
            parts = [np.clip(weights[-1][nearest == n], -reach, reach) for n in range(len(levels))]
            at_end.hist(parts, bins, stacked=True, color=list(colors), orientation="horizontal")
            at_end.set_title("at the end", fontsize=7)
            at_end.set_xticks([])
        panels[0, 0].set_ylim(-reach, reach)
        panels[0, 0].set_ylabel("latent weight / scale")
        panels[0, 0].set_yticks(levels)
        figure.suptitle(f"{title}: {layer}", fontsize=10)
        save(figure, path)
