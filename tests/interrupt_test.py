"""Ctrl-C, as a terminal sends it: a long run saves and says how to resume, a small one ends without a traceback."""

import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

from run_support import ROOT, STEPS_PER_EPOCH, finish, start


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(process):
    process.send_signal(signal.SIGINT)
    return *process.communicate(timeout=240), process.returncode


def test_a_long_run_saves_and_resumes(photos, environment, tmp_path):
    process = start(photos, tmp_path, environment, workers=1, epochs=40)
    wait_for(tmp_path / "checkpoints" / "6", process)
    printed, errors, code = interrupt(process)
    assert code == 130
    assert "saved; the same command resumes from there" in printed
    assert "Traceback" not in printed + errors
    step = max(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit())
    assert f"stopped at step {step} of {40 * STEPS_PER_EPOCH}" in printed
    epochs = step // STEPS_PER_EPOCH + 1
    printed, _ = finish(start(photos, tmp_path, environment, epochs=epochs))
    assert f"step {step} of {epochs * STEPS_PER_EPOCH}" in printed


def test_a_small_run_ends_with_a_line(environment, tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "digits.py"), f"--workdir={tmp_path}", "--config.constraint=binary"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "checkpoints" / "pretrained", process)
    _, errors, code = interrupt(process)
    assert code == 130
    assert errors.splitlines()[-1] == "interrupted; this run cannot be resumed, and the same command starts it again"
    assert "Traceback" not in errors
