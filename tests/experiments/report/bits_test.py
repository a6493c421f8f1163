"""The table of bits per byte."""

import dataclasses
import math

import pytest
from common.report.bits import bits_per_byte, bits_table
from common.report.workdir import Summary

PRETRAINED = Summary(
    experiment="text", constraint="full precision", method="", seed=0, full_precision_top1=0.5,
    top1=0.5, top5=0.8, cfs=0.0, cfs_relative=0.0, bits_per_weight=32, bytes_packed=1,
    bytes_float32=1, seconds=1.0, test_loss=2 * math.log(2),
)  # fmt: skip


def run(constraint, method, bits, distilled=False):
    loss = bits * math.log(2)
    changes = {"constraint": constraint, "method": method, "distilled": distilled}
    return dataclasses.replace(PRETRAINED, test_loss=loss, **changes)


def test_rows_and_differences():
    runs = [
        run("full precision", "full_precision", 1.75),
        run("ternary", "ste", 1.875),
        run("ternary", "ste", 1.75 + 1 / 64, distilled=True),
        run("binary", "cbp", 2.5),
    ]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in bits_table(PRETRAINED, runs).splitlines()[2:]
    ]
    assert rows == [
        ["full precision", "pre-trained", "2.000", "", "", ""],
        ["full precision", "trained on", "1.750", "+0.000", "", ""],
        ["ternary", "STE", "1.875", "+0.125", "1.766", "+0.016"],
        ["binary", "CBP", "2.500", "+0.750", "", ""],
    ]


def test_a_run_without_test_data_is_refused():
    with pytest.raises(ValueError, match="no loss on test data"):
        bits_per_byte(dataclasses.replace(PRETRAINED, test_loss=None))
