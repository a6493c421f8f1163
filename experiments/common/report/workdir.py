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
from common.report import deploy

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """`summary.json`: one run. Accuracies are shares of 1, of the quantized weights; sizes are of the whole network."""

    experiment: str
    constraint: str
    seed: int
    full_precision_top1: float
    ste_top1: (
        float | None
    )  # the straight-through estimator alone, same start and budget; None: not run beside
    top1: float
    top5: float
    cfs: float
    cfs_relative: float
    bits_per_weight: int
    bytes_packed: int  # of codes, scales and the other parameters
    bytes_float32: int
    seconds: float
    bytes_file: int | None = (
        None  # of the packed file: batch statistics and a header besides; None: none was written
    )
    file_top1: float | None = None  # read back from it

    @classmethod
    def read(cls, workdir: Path) -> "Summary":
        """Of a run that ended; FileNotFoundError if there is none in the folder."""
        path = workdir / "summary.json"
        if not path.exists():
            raise FileNotFoundError(
                f"no run ended in {workdir}: there is no summary.json (under all constraints, name the folder of one)"
            )
        return cls(**json.loads(path.read_text()))


class Workdir:
    """A run's folder.

    Args:
      path: it is made if it is not there.
      step: the step that a run resumes from. Metrics of that step or later ones are removed,
        because they will come again; with 0 all that an earlier run left, but its checkpoints.
    """

    def __init__(self, path: str | os.PathLike[str], step: int = 0):
        self.path = Path(path)
        self.figures = self.path / "figures"
        self.checkpoints = self.path / "checkpoints"
        self.path.mkdir(parents=True, exist_ok=True)
        rows = [row for row in self.rows(self.path) if row["step"] < step] if step else []
        for name in (
            "metrics_ste.jsonl",
            "summary.json",
            "table.md",
            deploy.PACKED_FILE,
            deploy.ONNX_FILE,
        ):
            (self.path / name).unlink(missing_ok=True)
        if rows:
            self._replace("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        else:
            (self.path / "metrics.jsonl").unlink(missing_ok=True)

    def write_config(self, config: ml_collections.ConfigDict) -> None:
        self._replace("config.json", config.to_json_best_effort(indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        """Writes a file so that a crash leaves the old one or the new one."""
        new = self.path / f"{name}.new"
        new.write_text(text)
        new.replace(self.path / name)

    def append_metrics(self, metrics: Mapping[str, Any], name: str = "metrics.jsonl") -> None:
        """Adds a line; what is not finite becomes null, because JSON has no word for it."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(_finite(metrics)) + "\n")

    @staticmethod
    def rows(path: Path) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` in a folder; a last one that was cut off by a crash is left out."""
        file = path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}\n")]

    def write_summary(self, summary: Summary) -> None:
        self._replace("summary.json", json.dumps(dataclasses.asdict(summary), indent=2) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def float32_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree as float32."""
    return sum(4 * leaf.size for leaf in jax.tree.leaves(tree))


def packed_bytes(params: PyTree, opt_state: PyTree) -> tuple[int, int]:
    """Bytes of the parameters with constrained weights as packed codes and a float32 scale, and of
    all as float32.

    Counted from the bits of each constraint, without the container's header.
    """
    float32 = float32_bytes(params)
    packed = float32
    for layer in jax.eval_shape(cbp_jax.layer_report, params, opt_state).layers:  # sizes alone
        packed += -4 * layer.weights + (layer.weights * layer.bits + 7) // 8 + 4 * layer.scales
    return packed, float32


def size_text(count: int) -> str:
    """Bytes as kB, from a million on as MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in lines
    )


def results_table(summaries: Sequence[Summary]) -> str:
    """One line per constraint: accuracies before and after, whether the constraint is met, and what it saves."""
    columns: dict[str, list[str]] = {
        "constraint": [s.constraint for s in summaries],
        "full precision": [f"{s.full_precision_top1:.2%}" for s in summaries],
        "STE": ["" if s.ste_top1 is None else f"{s.ste_top1:.2%}" for s in summaries],
        "CBP": [f"{s.top1:.2%}" for s in summaries],
        "CFS": [f"{s.cfs:.1e}" for s in summaries],
        "CFS / scale": [f"{s.cfs_relative:.1e}" for s in summaries],
        "bits per weight": [str(s.bits_per_weight) for s in summaries],
        "size": [f"{size_text(s.bytes_packed)} of {size_text(s.bytes_float32)}" for s in summaries],
        "packed file": ["" if s.bytes_file is None else size_text(s.bytes_file) for s in summaries],
        "CBP from the file": [
            "" if s.file_top1 is None else f"{s.file_top1:.2%}" for s in summaries
        ],
    }
    columns = {
        name: cells for name, cells in columns.items() if any(cells)
    }  # not every run has all of them
    return format_table(tuple(columns), list(zip(*columns.values(), strict=True)))
