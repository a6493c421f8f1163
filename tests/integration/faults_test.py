"""A sample of `python -m faults`, and that the harness sees what it should."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

from faults import kills, outcome, subject
from pages import ROOT


def test_a_sample(environment, tmp_path):
    """A kill while a checkpoint is written, a full disk if it can be mounted, a damaged file."""
    command = [sys.executable, "-m", "faults", "--sample", "--cases=20"]
    done = subprocess.run(
        [*command, "--only=saving,full,checkpoint", f"--out={tmp_path / 'faults.json'}"],
        cwd=ROOT / "experiments",
        env={**environment, "PYTHONPATH": f"{ROOT / 'experiments'}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "faults.json").read_text())["faults"]
    assert len(found) in (2, 3)
    assert all(fault["tried"] == 1 and fault["problems"] == [] for fault in found)


def test_what_went_wrong_is_counted():
    found = outcome.tally("a fault", "what happens", "nothing", ["", "no", ""])
    assert (found.tried, found.right, found.problems) == (3, 2, ("no",))


def test_ends_that_are_wrong():
    traceback = "Traceback (most recent call last):\n"
    assert subject.Ended(1, "error: no room").in_one_line
    assert not subject.Ended(1, f"{traceback}error: no room").in_one_line
    assert not subject.Ended(0, "error: no room").in_one_line
    saved, resumed = "stopped at step 1,234 of 2,000, saved", "images; step 1,234 of 2,000\n"
    assert kills._went_back(saved, resumed) == ""
    assert kills._went_back(saved, resumed.replace("1,234", "1,230")) != ""
    assert kills._went_back("", resumed) == ""


def test_results_that_differ(monkeypatch, tmp_path):
    reference = {"ternary: packed": b"1", "ternary: state": (160, {})}
    monkeypatch.setattr(subject, "result", lambda workdir: {**reference, "ternary: packed": b"2"})
    assert subject.difference(tmp_path, reference) == "ternary: packed"
