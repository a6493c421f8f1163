"""Long runs that take minutes: on the sample of ImageNet, and on two hosts."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

from common.report.workdir import read_metrics
from run_support import ROOT, STEPS_PER_EPOCH, command, finish


@pytest.mark.slow
@pytest.mark.skipif(
    "TFDS_DATA_DIR" not in os.environ
    or not (Path(os.environ["TFDS_DATA_DIR"]) / "imagenet2012").is_dir(),
    reason="needs ImageNet, or a sample of it, as ArrayRecord in TFDS_DATA_DIR",
)
def test_imagenet_resnet18_is_killed_resumed_and_evaluated(environment, tmp_path):
    """On a sample of photos, two epochs from random weights; it says nothing about accuracy."""
    script = str(ROOT / "experiments" / "imagenet_resnet18.py")
    short = [
        "--config.pretrained=random",
        "--config.epochs=2",
        "--config.batch_size=50",
        "--config.steps_per_epoch=14",
        "--config.dtype=float32",
    ]
    run = [sys.executable, script, f"--workdir={tmp_path}", *short]
    process = subprocess.Popen(
        run, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 1200
    while not (tmp_path / "checkpoints" / "14").is_dir():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    process.communicate()
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step 14 of 28" in done.stdout
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [14, 28]
    assert all(np.isfinite(row["loss"]) for row in rows)
    command = [sys.executable, str(ROOT / "experiments" / "evaluate.py"), f"--workdir={tmp_path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"top-1 {rows[-1]['top1']:.2%}, top-5 {rows[-1]['top5']:.2%}" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [2, 4])
def test_two_hosts_stop_together_and_resume(photos, environment, tmp_path, fsdp):
    """SIGTERM to one of two processes; both save the same step, and a second pair finishes the run.

    All kernels are split over two devices of a host, or over all four of both.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**environment, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    changes = {
        "epochs": 30,
        "fsdp": fsdp,
        "distributed": True,
        "coordinator": f"localhost:{port}",
        "num_processes": 2,
    }

    def start_pair(epochs):
        code = (
            "import runpy, sys\n"
            "sys.argv = sys.argv[1:]\n"
            f"sys.path.insert(0, {str(ROOT / 'experiments')!r})\n"
            "from common.training import mesh\n"
            "mesh._MIN_SHARDED = 1\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        commands = [
            command(photos, tmp_path / "run", **{**changes, "epochs": epochs, "process_id": index})
            for index in (0, 1)
        ]
        return [
            subprocess.Popen(
                [python, "-c", code, *rest],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for python, *rest in commands
        ]

    first, second = start_pair(30)
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoints" / "4").is_dir():
        assert first.poll() is None, first.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    second.send_signal(signal.SIGTERM)
    printed, _ = finish(first)
    finish(second)
    stopped = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert f"stopped at step {stopped} of 150, saved" in printed

    epochs = stopped // STEPS_PER_EPOCH + 1
    first, second = start_pair(epochs)
    printed, _ = finish(first)
    finish(second)
    assert f"step {stopped} of {epochs * STEPS_PER_EPOCH}" in printed
    rows = read_metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list(range(1, epochs + 1))
    assert (tmp_path / "run" / "summary.json").exists()
