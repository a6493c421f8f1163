"""Ctrl-C, as a terminal sends it: a long run saves and says how to resume, a small one ends without a traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

from run_support import ROOT, STEPS_PER_EPOCH, command, finish, start


def start_in_group(arguments, environment):
    """In a process group of its own, all of which a terminal would interrupt: the processes that decode photos too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)


def wait_for(path, process):
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def interrupt(process):
    os.killpg(process.pid, signal.SIGINT)
    return *process.communicate(timeout=240), process.returncode


def test_a_long_run_saves_and_resumes(photos, environment, tmp_path):
    process = start_in_group(command(photos, tmp_path, workers=1, epochs=40), environment)
    wait_for(tmp_path / "checkpoints" / "6", process)
    printed, errors, code = interrupt(process)
    assert code == 130
    assert "saved; the same command resumes from there" in printed
    assert "Traceback" not in printed + errors
    step = max(
        int(folder.name) for folder in (tmp_path / "checkpoints").iterdir() if folder.name.isdigit()
    )
    assert f"stopped at step {step} of {40 * STEPS_PER_EPOCH}" in printed
    epochs = step // STEPS_PER_EPOCH + 1
    printed, _ = finish(start(photos, tmp_path, environment, epochs=epochs))
    assert f"step {step} of {epochs * STEPS_PER_EPOCH}" in printed


def test_a_small_run_ends_with_a_line(environment, tmp_path):
    digits = [
        sys.executable,
        str(ROOT / "experiments" / "digits.py"),
        f"--workdir={tmp_path}",
        "--config.constraint=binary",
    ]
    process = start_in_group(digits, environment)
    wait_for(tmp_path / "checkpoints" / "pretrained", process)
    _, errors, code = interrupt(process)
    assert code == 130
    assert (
        errors.splitlines()[-1]
        == "interrupted; this run cannot be resumed, and the same command starts it again"
    )
    assert "Traceback" not in errors


def test_a_second_one_ends_a_process_that_hangs(environment):
    """The first is remembered, the second is left to the system; after the loop Ctrl-C is Python's again."""
    code = (
        f"import os, signal, sys; sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from common.training import loop\n"
        "for _ in range(2):\n"
        "    stop = loop.StopRequest()\n"
        "    assert not stop.after(1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert stop.after(2) and stop.interrupted\n"
        "    stop.close()\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        raise AssertionError('not interrupted')\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "stop = loop.StopRequest()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "assert stop.asked and not stop.interrupted\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('twice', flush=True)\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "finally:\n"
        "    print('caught')\n"
    )
    process = start_in_group([sys.executable, "-c", code], environment)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGINT, errors
    assert printed == "twice\n"


def test_before_the_first_step_a_long_run_says_what_resumes(photos, environment, tmp_path):
    code = (
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
        "from common.training import run as runner\n"
        "def interrupted(*_): raise KeyboardInterrupt\n"
        "runner.open_data = interrupted\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    python, *rest = command(photos, tmp_path)
    process = start_in_group([python, "-c", code, *rest], environment)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert (
        errors
        == "interrupted; the same command resumes from the newest checkpoint, or starts again if there is none\n"
    )
