"""What a run leaves in its workdir: config, metrics, weights for the histograms, summary."""

import contextlib
import dataclasses
import json
import math
import os
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import jax
import ml_collections
import numpy as np

import cbp_jax
from common.report import deploy

PyTree = Any
METHODS = {  # of post-training, as tables and figures say
    "cbp": "CBP",
    "closing": "CBP, closing",
    "no_window": "CBP, no window",
    "ste": "STE",
    "parq": "PARQ",
    "binary_relax": "BinaryRelax",
    "rounding": "rounding",
    "full_precision": "full precision",
}
FULL_PRECISION = "full precision"  # as constraint of a summary


@dataclasses.dataclass(frozen=True)
class Summary:
    """`summary.json`. Accuracies are fractions, of the quantized weights; sizes are in bytes.

    They are measured on the validation images where some were held out, else on the test images.
    """

    experiment: str
    constraint: str  # or FULL_PRECISION
    method: str  # of METHODS; empty in pre-training
    seed: int
    full_precision_top1: float  # of the weights the run started from
    top1: float
    top5: float
    cfs: float
    cfs_relative: float
    bits_per_weight: int
    bytes_packed: int  # codes, scales and the other parameters
    bytes_float32: int
    seconds: float  # of all its processes, but for what kills lost: steps that were taken again
    bytes_file: int | None = None  # of the packed file, with batch statistics and its header
    file_top1: float | None = None  # of the weights read back from it
    eval_loss: float | None = None  # mean cross-entropy in nats; of text, per byte
    # On the test images, measured once; None where the other figures are measured on them.
    test_top1: float | None = None
    test_loss: float | None = None
    full_precision_test_top1: float | None = None
    multipliers: Mapping[str, float] | None = None  # the mean of each layer, if it has any
    best: Mapping[str, float] | None = None  # the figures of the checkpoint in `best/`, if any
    distilled: bool = False  # whether it had a teacher

    @property
    def constrained(self) -> bool:
        """Whether its weights are on levels."""
        return self.constraint != FULL_PRECISION

    @classmethod
    def read(cls, workdir: Path) -> "Summary":
        """Reads the summary of a finished run.

        Raises:
          FileNotFoundError: if it has none.
          ValueError: if it is damaged.
        """
        path = workdir / "summary.json"
        if not path.exists():
            raise FileNotFoundError(f"no finished run in {workdir}: there is no summary.json")
        try:
            summary = cls(**json.loads(path.read_text()))
            for field in dataclasses.fields(cls):
                value = getattr(summary, field.name)
                if not _has_type(value, field.type):
                    raise TypeError(f"{field.name} is {value!r:.100}")
            return summary
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged, or of another version ({error}): remove it, and rerun the "
                "command of the run, which measures it again"
            ) from error


def _has_type(value: Any, of: Any) -> bool:
    """Whether a value from JSON has the type of a field; a float may be written as an integer."""
    if isinstance(of, UnionType):
        return any(_has_type(value, one) for one in get_args(of))
    if get_origin(of) is Mapping:
        number = get_args(of)[1]
        return isinstance(value, dict) and all(_has_type(v, number) for v in value.values())
    return type(value) in ((int, float) if of is float else (of,))


class Workdir:
    """A run's folder.

    Args:
      path: of the folder, made if necessary.
      step: the last one whose metrics are kept, because later ones will come again; None for a new
        run.
      writes: whether this process writes; of several hosts, one does.
    """

    def __init__(self, path: Path, step: int | None = None, writes: bool = True):
        self.path, self._step, self._writes = path, step or 0, writes
        self._tensorboard: Any = None
        if not writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(path) if row["step"] <= self._step]
        (path / "metrics.jsonl").unlink(missing_ok=True)
        if rows:
            self._replace("metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        for name in ("summary.json", deploy.PACKED_FILE):
            (path / name).unlink(missing_ok=True)
        for snapshot in path.glob("weights_*.npz") if step is None else ():
            snapshot.unlink()

    def close(self) -> None:
        """Closes TensorBoard's file."""
        if self._tensorboard:
            self._tensorboard.close()

    def write_config(self, config: ml_collections.FrozenConfigDict) -> None:
        self._replace("config.json", config.to_json_best_effort(indent=2) + "\n")

    def write_summary(self, summary: Summary) -> None:
        self._replace("summary.json", json.dumps(dataclasses.asdict(summary), indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        if self._writes:
            replace_text(self.path / name, text)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Adds a line, and TensorBoard's scalars; what is not finite becomes null in JSON."""
        if not self._writes:
            return
        path = self.path / "metrics.jsonl"
        with _named(path), path.open("a") as file:
            file.write(json.dumps(_finite(row)) + "\n")
        if self._tensorboard is None:
            from tensorboardX import SummaryWriter  # slow to import where torch is installed

            # Scalars of later steps will come again.
            folder = str(self.path / "tensorboard")
            self._tensorboard = SummaryWriter(folder, purge_step=self._step + 1)
        for name, value in row.items():
            layers = value.items() if isinstance(value, Mapping) else ((None, value),)
            for layer, number in layers:
                if name not in ("epoch", "step"):
                    tag = f"{name}/{layer}" if layer else name
                    self._tensorboard.add_scalar(tag, number, row["step"])
        self._tensorboard.flush()

    def save_weights(self, moment: str, weights: Mapping[str, np.ndarray]) -> None:
        """Keeps the weights of "before" or "midway", for the histograms, or of "stepN"."""
        path = self.path / f"weights_{moment}.npz"
        if self._writes:
            with _named(path):
                np.savez(path, **weights)  # type: ignore[arg-type]

    def load_weights(self, moment: str) -> dict[str, np.ndarray]:
        """Reads what `save_weights` wrote.

        Raises:
          FileNotFoundError: if the file is missing.
          ValueError: if it is damaged.
        """
        path = self.path / f"weights_{moment}.npz"
        try:
            with np.load(path) as weights:
                return dict(weights)
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged ({error})") from error


def replace_text(path: Path, text: str) -> None:
    """Writes a file so that a crash leaves the old one or the new one."""
    new = path.with_name(f"{path.name}.new")
    with _named(path), new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Names the file in errors of writing, which do not say it of themselves."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the lines of `metrics.jsonl`, without a last one that a crash cut off.

    A line that is damaged is left out, with a warning.
    """
    file, rows = workdir / "metrics.jsonl", []
    text = file.read_text(errors="replace") if file.exists() else ""
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
            rows.append({**row, "step": int(row["step"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            warnings.warn(f"line {number} of {file} is damaged, and left out", stacklevel=2)
    return rows


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def float32_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays of a tree as float32."""
    return sum(4 * leaf.size for leaf in jax.tree.leaves(tree))


def packed_bytes(params: PyTree, opt_state: PyTree) -> int:
    """Returns the bytes of the parameters with packed codes and scales, without a header."""
    packed = float32_bytes(params)
    layers = jax.eval_shape(cbp_jax.layer_report, params, opt_state).layers  # sizes alone
    for layer in layers:
        packed += -4 * layer.weights + (layer.weights * layer.bits + 7) // 8 + 4 * layer.scales
    return packed


def size_text(count: int) -> str:
    """Returns bytes as kB, from a million on as MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
