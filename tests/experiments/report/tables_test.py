"""The table of results."""

from common.report.tables import results_table
from common.report.workdir import Summary


def summary(**changes):
    fields = dict.fromkeys(("cfs", "cfs_relative", "seconds"), 0.0)
    fields |= dict.fromkeys(("seed", "bits_per_weight", "bytes_packed", "bytes_float32"), 1)
    names = {"experiment": "digits", "constraint": "binary", "method": "cbp"}
    accuracies = {"full_precision_top1": 0.9, "top1": 0.8, "top5": 1.0}
    return Summary(**{**names, **fields, **accuracies, **changes})


def cells(table):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    return {column[0]: list(column[2:]) for column in zip(*rows, strict=True)}


def test_test_accuracies_are_shown_if_a_run_has_any():
    assert not any("test" in name for name in cells(results_table([summary(), summary()])))
    other = summary(test_top1=0.75, full_precision_test_top1=0.875)
    found = cells(results_table([summary(), other]))
    assert found["top-1"] == ["80.00%", "80.00%"]
    assert found["test top-1"] == ["", "75.00%"]
    assert found["test top-1 before"] == ["", "87.50%"]
