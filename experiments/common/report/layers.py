"""Which layers suffer most: what their multipliers say, and what freeing each in turn gives."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from common.report.comparison import Cell, cells, difference
from common.report.tables import format_table
from common.report.workdir import METHODS

ALL, WITHOUT = "all", "without"


def variant(method: str, layer: str | None) -> str:
    """The name of a variant: every layer constrained, or all but one."""
    return f"{method}_{ALL}" if layer is None else f"{method}_{WITHOUT}_{layer.replace('/', '.')}"


def layers_table(folder: Path) -> str:
    """One row per method and layer; in the last row of a method, how the two rankings agree.

    Args:
      folder: of a study of `variant`s; methods without multipliers are left out.
    """
    found = cells(folder)
    rows = []
    for method in METHODS:
        for (_, name), cell in found.items():
            if name == variant(method, None) and cell.summaries[0].multipliers:
                rows += _rows(method, cell, list(found.values()))
    return format_table(("method", "layer", "multiplier, mean", "gained by freeing it"), rows)


def _rows(method: str, every: Cell, found: Sequence[Cell]) -> list[list[str]]:
    prefix = variant(method, "")
    freed = {
        cell.method.removeprefix(prefix).replace(".", "/"): cell
        for cell in found
        if cell.method.startswith(prefix) and cell.constraint == every.constraint
    }
    means = {
        layer: float(np.mean([summary.multipliers[layer] for summary in every.summaries]))  # type: ignore[index]
        for layer in freed
    }
    gains = {layer: difference(cell, every) for layer, cell in freed.items()}
    rank = stats.spearmanr(list(means.values()), [gain.mean for gain in gains.values()]).statistic
    ordered = sorted(freed, key=lambda layer: -means[layer])
    return [
        *([METHODS[method], layer, f"{means[layer]:.3g}", str(gains[layer])] for layer in ordered),
        [METHODS[method], "rank correlation", "", f"{rank:+.2f}"],
    ]
