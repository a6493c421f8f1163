"""Progress bars that show their figures on 80 columns."""

import math
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

# The graphic takes what the rest leaves; elapsed time and, in long runs, rate are there before the
# first figures.
_SMALL = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
_LONG = "{desc} {percentage:3.0f}%|{bar}|<{remaining}, {rate_fmt}{postfix}"


def epochs(total: int, description: str) -> tqdm:
    """The bar of a small run, which counts epochs."""
    return tqdm(
        total=total,
        desc=description.ljust(17),
        unit="epoch",
        mininterval=0.5,
        dynamic_ncols=True,
        bar_format=_SMALL,
    )


def images(total: int, done: int, description: str, shown: bool) -> tqdm:
    """The bar of a long run, which counts images and may begin in the middle.

    Args:
      total: images of the whole run.
      done: those seen before it was stopped.
      description: what it does, in up to 14 letters.
      shown: whether this process shows it.
    """
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="img",
        unit_scale=True,
        mininterval=1,
        dynamic_ncols=True,
        disable=not shown,
        bar_format=_LONG,
    )


def figures(row: Mapping[str, Any], with_window: bool) -> str:
    """What the bar says of an epoch: accuracy, and of a constrained network its CFS and, where one closes, the window."""
    if "cfs" not in row:
        return f"loss {row['loss']:.3f}, top-1 {row['top1']:.2%}"
    shown = [f"top-1 {row['top1']:.2%}", f"CFS {row['cfs']:.1e}"]
    if with_window and math.isfinite(row["window"]):
        shown.append(f"g {row['window']:.0f}" if row["window"] < 1e4 else f"g {row['window']:.0e}")
    return ", ".join(shown)
