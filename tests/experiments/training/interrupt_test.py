"""Ctrl-C, as a terminal sends it: the state is saved, one line says how to resume, no traceback."""

import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

from run_support import ROOT, STEPS_PER_EPOCH, command, finish, start, study_command

PREAMBLE = f"import sys\nsys.path.insert(0, {str(ROOT / 'experiments')!r})\n"


def start_in_group(arguments, environment):
    """In a process group of its own, all of which a terminal interrupts, workers included."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, env=environment, start_new_session=True, **pipes)


def test_a_run_saves_and_resumes(photos, environment, tmp_path):
    changes = {"workers": 1, "preflight": False}
    process = start_in_group(command(photos, tmp_path, epochs=40, **changes), environment)
    deadline = time.monotonic() + 240
    while not (tmp_path / "checkpoints" / "2").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert "saved; rerun the same command to resume" in printed
    assert "Traceback" not in printed + errors
    step = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"stopped at step {step} of {40 * STEPS_PER_EPOCH}" in printed
    epochs = step // STEPS_PER_EPOCH + 1
    printed, _ = finish(start(photos, tmp_path, environment, epochs=epochs, **changes))
    assert f"step {step} of {epochs * STEPS_PER_EPOCH}" in printed


def test_a_second_one_ends_a_process_that_hangs(environment):
    """The first is remembered, the second is the system's; after the loop Ctrl-C is Python's."""
    code = PREAMBLE + (
        "import os, signal\n"
        "from common.training import loop\n"
        "for _ in range(2):\n"
        "    with loop.StopRequest() as stop:\n"
        "        assert not stop.after(1)\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        assert stop.after(2) and stop.status == 130\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        raise AssertionError('not interrupted')\n"
        "    except KeyboardInterrupt:\n"
        "        pass\n"
        "with loop.StopRequest() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert stop.asked and stop.status == 0\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('twice', flush=True)\n"
        "    try:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    finally:\n"
        "        print('caught')\n"
    )
    process = start_in_group([sys.executable, "-c", code], environment)
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == -signal.SIGINT, errors
    assert printed == "twice\n"


@pytest.mark.parametrize("where", ["open_data", "_deploy", "draw_run"])
def test_outside_of_the_loop_a_line_says_how_to_resume(environment, tmp_path, where):
    """As while it imports, reads the data, evaluates the packed file, or draws the figures."""
    code = PREAMBLE + (
        "import runpy, signal\n"
        "from common.training import run\n"
        f"run.{where} = lambda *arguments: signal.raise_signal(signal.SIGINT)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    short = {"epochs": 1, "pretrain_epochs": 1, "steps_per_epoch": 2}
    python, *rest = study_command(tmp_path, **short)
    process = start_in_group([python, "-c", code, *rest], environment)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130
    assert errors.endswith("\ninterrupted; rerun the same command to resume\n")
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("ternary_ste/summary.json"))


@pytest.mark.parametrize("script", ["evaluate.py", "export.py"])
def test_evaluation_and_export_end_with_a_line(environment, tmp_path, script):
    code = PREAMBLE + (
        "import runpy, signal\n"
        "from common.training import restore\n"
        "restore.restore = lambda *arguments: signal.raise_signal(signal.SIGINT)\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "experiments" / script)]
    process = start_in_group([*command, f"--workdir={tmp_path}"], environment)
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (130, "\ninterrupted\n")
