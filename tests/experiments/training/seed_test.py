"""The same seed gives the same run: in other processes to the bit, on other devices nearly."""

import os
import subprocess
import sys

import numpy as np
import pytest
from common.report.workdir import read_metrics
from run_support import ROOT
from same_run import assert_same_run, read_state

TRAIN = """
import sys
from pathlib import Path
from common.training.run import train_and_evaluate
from run_support import digits_config

train_and_evaluate(digits_config(figures=False), Path(sys.argv[1]))
"""


def train(workdir, hash_seed, devices):
    """Trains in a process of its own."""
    paths = (ROOT / "experiments", ROOT / "tests" / "support", ROOT)
    environment = {
        **os.environ,
        "PYTHONHASHSEED": hash_seed,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, "-c", TRAIN, str(workdir)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return train(tmp_path_factory.mktemp("one"), "1", 1)


def test_two_processes_with_other_hashes_are_one_run(on_one_device, tmp_path):
    assert_same_run(train(tmp_path / "other", "2", 1), on_one_device)


def test_eight_devices_differ_by_rounding(on_one_device, tmp_path):
    """Over a few steps: later, rounding moves a weight to another level here and there."""
    train(tmp_path, "1", 8)
    arrays, others = read_state(tmp_path), read_state(on_one_device)
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], rtol=0, atol=1e-6, err_msg=name)
    for row, other in zip(read_metrics(tmp_path), read_metrics(on_one_device), strict=True):
        for name in ("loss", "eval_loss", "cfs", "lagrangian"):
            assert row[name] == pytest.approx(other[name], rel=1e-6)
