"""The table of a study on text: bits per byte, of each method, without and with a teacher."""

import math
from collections.abc import Sequence

from common.report.tables import format_table
from common.report.workdir import FULL_PRECISION, METHODS, Summary


def bits_per_byte(summary: Summary) -> float:
    """Returns the cross-entropy on the text's held-out end, in bits per byte.

    Raises:
      ValueError: if the run did not measure it.
    """
    if summary.test_loss is None:
        raise ValueError(f"a run of {summary.experiment} has no loss on test data")
    return summary.test_loss / math.log(2)


def bits_table(pretrained: Summary, summaries: Sequence[Summary]) -> str:
    """Returns one row per constraint and method; "behind" counts from full precision trained on.

    Args:
      pretrained: of the weights that all started from.
      summaries: of the runs, the one that goes on in full precision among them, without a teacher.
    """
    found = {(s.constraint, s.method, s.distilled): bits_per_byte(s) for s in summaries}
    base = found[FULL_PRECISION, "full_precision", False]
    rows = [[FULL_PRECISION, "pre-trained", f"{bits_per_byte(pretrained):.3f}", "", "", ""]]
    for constraint, method in dict.fromkeys((s.constraint, s.method) for s in summaries):
        cells = []
        for distilled in (False, True):
            bits = found.get((constraint, method, distilled))
            cells += ["", ""] if bits is None else [f"{bits:.3f}", f"{bits - base:+.3f}"]
        name = "trained on" if constraint == FULL_PRECISION else METHODS[method]
        rows.append([constraint, name, *cells])
    header = ("weights", "method", "bits per byte", "behind", "with a teacher", "behind")
    return format_table(header, rows)
