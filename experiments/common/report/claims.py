"""The paper's claims about CBP, each answered by the figures of a comparison."""

import math
from collections.abc import Callable
from pathlib import Path

import cbp_jax
from common.report.comparison import FULL_PRECISION, Cell, Difference, cells, difference
from common.report.tables import format_table
from common.report.workdir import METHODS

_NEAR_ZERO = 0.01  # of CFS, in units of the scale


def claims_table(folder: Path, scratch: Path) -> str:
    """One row per claim, one column per constraint: a difference in points, and the answer.

    "yes" and "no" are differences of more than two standard errors, "open" is anything between, or
    of one seed. Within noise is what is not behind by so much.

    Args:
      folder: of a comparison from pre-trained weights.
      scratch: of one from random weights.
    """
    found, random = cells(folder), cells(scratch)
    constraints = [c for c in cbp_jax.CONSTRAINTS if any(c == of for of, _ in found)]
    full = next((cell for (_, method), cell in found.items() if method == FULL_PRECISION), None)
    rows = []

    def add(claim: str, answer: Callable[[str], str]) -> None:
        cells_of_row = [answer(constraint) for constraint in constraints]
        if any(cells_of_row):
            rows.append([claim, *cells_of_row])

    def ahead(a: str, b: str) -> Callable[[str], str]:
        return lambda c: _answer(found.get((c, a)), found.get((c, b)), lambda d: d.sign)

    for method in ("cbp", "closing"):
        name = METHODS[method]
        add(f"{name} is ahead of STE", ahead(method, "ste"))
        add(f"{name} is ahead of CBP without the window", ahead(method, "no_window"))
    add("STE is ahead of CBP without the window", ahead("ste", "no_window"))
    for method in ("cbp", "closing"):
        name = METHODS[method]
        add(f"{name}: CFS / scale is near 0", lambda c, m=method: _near_zero(found.get((c, m))))  # type: ignore[misc]
        add(
            f"{name} is within noise of full precision trained on",
            lambda c, m=method: _answer(
                found.get((c, m)), full, lambda d: 1 if d.sign >= 0 else -1
            ),  # type: ignore[misc]
        )
        add(f"{name}: ternary is ahead of binary", lambda c, m=method: _ternary(found, c, m))  # type: ignore[misc]
        add(
            f"{name}: pre-trained is ahead of random weights",
            lambda c, m=method: _answer(found.get((c, m)), random.get((c, m)), lambda d: d.sign),  # type: ignore[misc]
        )
    return format_table(("claim", *(c.replace("_", "-") for c in constraints)), rows)


def _answer(a: Cell | None, b: Cell | None, sign: Callable[[Difference], int]) -> str:
    if a is None or b is None:
        return ""
    found = difference(a, b)
    if math.isnan(found.error):
        return f"open, {found}"
    if a.summaries[0].experiment == "shakespeare_llama":  # a loss
        return f"{({1: 'no', 0: 'open', -1: 'yes'})[sign(found)]}, {found}"
    return f"{({1: 'yes', 0: 'open', -1: 'no'})[sign(found)]}, {found}"


def _ternary(found: dict[tuple[str, str], Cell], constraint: str, method: str) -> str:
    if constraint != "ternary":
        return ""
    a, b = found.get(("ternary", method)), found.get(("binary", method))
    return _answer(a, b, lambda d: d.sign)


def _near_zero(cell: Cell | None) -> str:
    if cell is None:
        return ""
    worst = max(summary.cfs_relative for summary in cell.summaries)
    return f"{'yes' if worst < _NEAR_ZERO else 'no'}, {worst:.1e}"
