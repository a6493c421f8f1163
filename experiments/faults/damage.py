"""Files of an interrupted run that are damaged before it resumes."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from common.training.checkpoints import newest_step

from faults import subject
from faults.outcome import RIGHT

_RUN = subject.RUNS[-1]
Damage = Callable[[Path, np.random.Generator], None]


def interrupted(folder: Path) -> Path:
    """Makes a study that was killed in the last run, with checkpoints and logged epochs."""
    workdir = folder / "interrupted"
    process = subject.start(workdir)
    run = workdir / _RUN / "checkpoints"
    if not subject.wait_for(process, lambda: (newest_step(run) or 0) >= 70):
        raise RuntimeError(f"it ended before: {subject.end(process).printed[-300:]}")
    process.kill()
    subject.end(process)
    return workdir


def damaged(
    template: Path,
    folder: Path,
    reference: Mapping[str, Any],
    damage: Damage,
    rng: np.random.Generator,
    trials: int,
    refusal: str = "",
) -> Iterator[str]:
    """Damages copies of an interrupted study, and resumes them.

    Args:
      template: of `interrupted`.
      folder: for the copies.
      reference: the result without faults.
      damage: what to do to the run's folder.
      rng: decides what `damage` does.
      trials: how many.
      refusal: name of the file for whose damage the run may refuse to go on, in one line.

    Yields:
      For each trial RIGHT, or what went wrong.
    """
    for _ in range(trials):
        workdir = folder / "damaged"
        shutil.copytree(template, workdir)
        damage(workdir / _RUN, rng)
        ended = subject.finish(workdir)
        if refusal and ended.in_one_line and refusal in ended.printed:
            yield RIGHT
        elif ended.status:
            yield f"status {ended.status}: {ended.printed[-600:]}"
        else:
            yield subject.difference(workdir, reference)
        shutil.rmtree(workdir)


def newest_checkpoint(run: Path, rng: np.random.Generator) -> None:
    """Flips a bit of one of the files of the newest checkpoint, or truncates or removes it."""
    step = run / "checkpoints" / str(newest_step(run / "checkpoints"))
    files = sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)
    file = files[rng.integers(len(files))]
    content, how = bytearray(file.read_bytes()), rng.integers(4)
    if how == 0:
        file.unlink()
    elif how == 1:
        file.write_bytes(content[: rng.integers(len(content))])
    else:
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)


def config(run: Path, rng: np.random.Generator) -> None:
    """Truncates the config."""
    _truncate(run / "config.json", rng)


def metrics(run: Path, rng: np.random.Generator) -> None:
    """Cuts the last line of the metrics, as a crash does."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    # The epoch after the newest checkpoint is measured again; its line is what a crash cuts.
    file.write_text("".join(lines) + json.dumps({"epoch": 99})[: int(rng.integers(1, 10))])


def _truncate(file: Path, rng: np.random.Generator) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.integers(len(content))])
