"""What a run leaves behind in its workdir: config, metrics, summary, and the table at the end."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

import cbp_jax

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """`summary.json`: one run. Accuracies are shares of 1, of the quantized weights; sizes are of the whole network."""

    experiment: str
    constraint: str
    seed: int
    full_precision_top1: float
    ste_top1: float  # the straight-through estimator alone, same start and budget
    top1: float
    top5: float
    cfs: float
    cfs_relative: float
    bits_per_weight: int
    bytes_packed: int
    bytes_float32: int
    seconds: float


class Workdir:
    """A run's folder; the metrics and results that an earlier run left there are replaced."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.figures = self.path / "figures"
        self.checkpoints = self.path / "checkpoints"
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "metrics_ste.jsonl", "summary.json", "table.md"):
            (self.path / name).unlink(missing_ok=True)

    def write_config(self, config: ml_collections.ConfigDict) -> None:
        (self.path / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")

    def append_metrics(self, metrics: Mapping[str, float], name: str = "metrics.jsonl") -> None:
        """Adds a line; what is not finite becomes null, because JSON has no word for it."""
        row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        with (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def write_summary(self, summary: Summary) -> None:
        (self.path / "summary.json").write_text(json.dumps(dataclasses.asdict(summary), indent=2) + "\n")


def packed_bytes(params: PyTree, opt_state: PyTree) -> tuple[int, int]:
    """Bytes of the parameters with constrained weights as packed codes and a float32 scale, and of all as float32.

    Counted from the bits of each constraint, without the container's header.
    """
    float32 = sum(4 * leaf.size for leaf in jax.tree.leaves(params))
    packed = float32
    for layer in cbp_jax.layer_report(params, opt_state).layers:
        packed += -4 * layer.weights + (layer.weights * layer.bits + 7) // 8 + 4 * layer.scales
    return packed, float32


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines)


def results_table(summaries: Sequence[Summary]) -> str:
    """One line a constraint: accuracies before and after, whether the constraint is met, and what it saves."""
    header = ("constraint", "full precision", "STE", "CBP", "CFS", "CFS / scale", "bits per weight", "size")
    rows = [
        (
            s.constraint,
            f"{s.full_precision_top1:.2%}",
            f"{s.ste_top1:.2%}",
            f"{s.top1:.2%}",
            f"{s.cfs:.1e}",
            f"{s.cfs_relative:.1e}",
            str(s.bits_per_weight),
            f"{s.bytes_packed / 1000:.1f} kB of {s.bytes_float32 / 1000:.1f} kB",
        )
        for s in summaries
    ]
    return format_table(header, rows)
