"""One run at a time in a workdir."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

from common.config import ConfigError
from common.training import lock
from common.training.run import train_and_evaluate
from run_support import ROOT, digits_config

HOLD = (
    "import pathlib, sys, time; from common.training import lock\n"
    "with lock.locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(300)"
)


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a workdir."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'experiments'}:{ROOT}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield workdir, process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_and_touches_nothing(holder):
    workdir, process = holder
    before = sorted((path.name, path.stat().st_mtime_ns) for path in workdir.iterdir())
    expected = rf"in use by process {process.pid} on {socket.gethostname()}, since 20\d\d-"
    with pytest.raises(ConfigError, match=expected):
        train_and_evaluate(digits_config(), workdir)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in workdir.iterdir()) == before


def test_the_lock_of_a_killed_process_is_free(holder):
    workdir, process = holder
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (workdir / lock.HOLDER).exists()
    with lock.locked(workdir):
        assert json.loads((workdir / lock.HOLDER).read_text())["process"] == os.getpid()
    assert not (workdir / lock.HOLDER).exists()


def test_a_lock_is_given_up_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="inside"), lock.locked(tmp_path):
        raise RuntimeError("inside")
    with lock.locked(tmp_path):
        pass


@pytest.mark.parametrize("note", ["", "{", "[]", '{"host": "a"}', "null"])
def test_a_damaged_note_is_no_obstacle(holder, note):
    workdir, _ = holder
    (workdir / lock.HOLDER).write_text(note)
    with (
        pytest.raises(ConfigError, match="is in use by another run: wait for it"),
        lock.locked(workdir),
    ):
        pass
