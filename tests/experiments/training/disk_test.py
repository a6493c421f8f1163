"""A disk without room, a read-only workdir: one line, and what was saved stays."""

import errno
import shutil
import types
from pathlib import Path

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

from common.config import ConfigError
from common.report.workdir import Summary, read_metrics
from common.training import checkpoints, disk
from common.training.run import train_and_evaluate
from run_support import STEPS_PER_EPOCH, digits_config

CONFIG = {"checkpoint_steps": 0, "keep_best": False}


@pytest.fixture
def half_done(tmp_path):
    """A workdir whose run is to go on from the end of its first epoch."""
    train_and_evaluate(digits_config(epochs=1, **CONFIG), tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json.new", "summary.json.new"])
def test_a_full_disk_while_a_file_is_written(half_done, name, monkeypatch):
    """/dev/full fails as a full disk does."""
    opened = Path.open

    def open_full(path, mode="r", **options):
        full = path.name == name and mode in ("a", "w")
        return opened(Path("/dev/full") if full else path, mode, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(disk.DiskError) as caught:
        train_and_evaluate(digits_config(**CONFIG), half_done)
    message = str(caught.value)
    assert name.removesuffix(".new") in message
    assert "No space left on device" in message
    assert "\n" not in message
    epochs = {"config.json.new": 1, "metrics.jsonl": 1, "summary.json.new": 3}[name]
    assert f"the checkpoint of step {epochs * STEPS_PER_EPOCH} is intact" in message
    monkeypatch.undo()
    summary = train_and_evaluate(digits_config(**CONFIG), half_done)
    assert summary == Summary.read(half_done)
    assert [row["epoch"] for row in read_metrics(half_done)] == [1, 2, 3]


def test_too_little_room_for_two_checkpoints(half_done, monkeypatch):
    usage = types.SimpleNamespace(free=1000, total=2000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        disk.DiskError, match=r"two checkpoints need 0\.\d MB, and 0\.0 MB are free"
    ):
        train_and_evaluate(digits_config(**CONFIG), half_done)
    with pytest.raises(disk.DiskError, match=r"three checkpoints need"):  # the best is one
        train_and_evaluate(digits_config(**{**CONFIG, "keep_best": True}), half_done)
    monkeypatch.undo()
    before = disk._free
    # Room at the start, and none left when the checkpoint is due.
    free = iter([10**9, 10**9, 0, 0, 0])
    monkeypatch.setattr(disk, "_free", lambda folder: next(free))
    with pytest.raises(disk.DiskError, match=f"the checkpoint of step {2 * STEPS_PER_EPOCH} is"):
        train_and_evaluate(digits_config(**CONFIG), half_done)
    monkeypatch.setattr(disk, "_free", before)
    train_and_evaluate(digits_config(**CONFIG), half_done)
    assert [row["epoch"] for row in read_metrics(half_done)] == [1, 2, 3]


def raise_from(error):
    with disk.explained(Path("runs/here")):
        raise error


def test_what_is_and_is_not_explained():
    quota = OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(disk.DiskError, match="cannot write a file: Disk quota exceeded"):
        raise_from(quota)
    denied = PermissionError(errno.EACCES, "Permission denied", "runs/here/config.json.new")
    with pytest.raises(disk.DiskError, match=r"cannot write runs/here/config.json.new"):
        raise_from(denied)
    above = PermissionError(errno.EACCES, "Permission denied", str(Path("runs").absolute()))
    with pytest.raises(disk.DiskError, match=r"cannot write .*/runs: Permission denied"):
        raise_from(above)
    with pytest.raises(disk.DiskError, match="cannot write a checkpoint: No space left"):
        raise_from(ValueError("RESOURCE_EXHAUSTED: ... [OS error 28: No space left on device]"))
    for other in (
        PermissionError(errno.EACCES, "Permission denied", "elsewhere/photo.JPEG"),
        OSError(errno.EROFS, "Read-only file system", "elsewhere/x.lock"),
        OSError(errno.ENOSPC, "No space left on device", "elsewhere/psm_1"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "runs/here/x"),
        ValueError("shapes differ"),
    ):
        with pytest.raises(type(other)) as caught:
            raise_from(other)
        assert caught.value is other


def test_the_newest_step_is_of_a_checkpoint_that_was_written_to_its_end(tmp_path):
    assert checkpoints.newest_step(tmp_path / "none") is None
    for name in ("5", "10", "20.orbax-checkpoint-tmp", "damaged_30"):
        (tmp_path / name).mkdir()
    assert checkpoints.newest_step(tmp_path) == 10


def test_launch_prints_the_line():
    assert issubclass(disk.DiskError, ConfigError)
