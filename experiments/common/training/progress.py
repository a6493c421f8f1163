"""Progress bars that show their figures on 80 columns."""

import math
from collections.abc import Mapping
from typing import Any

import ml_collections
from tqdm import tqdm

# The graphic takes what the rest leaves; the rate is known before the first figures.
_LABELS = {
    "cbp": "",
    "closing": " closing",
    "no_window": " g=inf",
    "ste": " STE",
    "parq": " PARQ",
    "binary_relax": " relax",
    "rounding": " round",
}
_FORMAT = "{desc} {percentage:3.0f}%|{bar}|<{remaining}, {rate_fmt}{postfix}"


def images(total: int, done: int, description: str, shown: bool) -> tqdm:
    """Returns a bar that counts images and may begin in the middle.

    Args:
      total: images of the whole run.
      done: those seen by earlier processes.
      description: what it does.
      shown: whether this process shows it.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="img",
        unit_scale=True,
        mininterval=0.5,
        dynamic_ncols=True,
        disable=not shown,
        bar_format=_FORMAT,
    )


def description(config: ml_collections.FrozenConfigDict) -> str:
    """Returns what a bar's run does, in up to 17 letters, 13 where a window is shown."""
    if config.phase == "pretrain":
        return "full precision"
    if config.method == "full_precision":
        return "trained on"
    return config.constraint + _LABELS[config.method]


def figures(row: Mapping[str, Any], with_window: bool) -> str:
    """Returns an epoch's accuracy and, under a constraint, its CFS and the window if one closes."""
    if "cfs" not in row:
        return f"loss {row['loss']:.3f}, top-1 {row['top1']:.2%}"
    shown = [f"top-1 {row['top1']:.2%}", f"CFS {row['cfs']:.1e}"]
    if with_window and math.isfinite(row["window"]):
        shown.append(f"g {row['window']:.0f}" if row["window"] < 1e4 else f"g {row['window']:.0e}")
    return ", ".join(shown)
