"""A study: pre-trained once, one ordinary run per entry, a table; stopped and resumed."""

import json
import shutil
import signal
import subprocess
import time

import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

from common import study
from common.report.workdir import Summary, read_metrics
from common.training import loop
from run_support import digits_study, run_script, study_command

import cbp_jax

RUNS = ("pretrain", "ternary_ste", "ternary")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("study")
    return workdir, study.run(digits_study(), workdir)


def test_every_run_is_an_ordinary_one(finished):
    workdir, summaries = finished
    assert summaries == [Summary.read(workdir / name) for name in RUNS[1:]]
    assert [summary.method for summary in summaries] == ["ste", "cbp"]
    pretrained = Summary.read(workdir / "pretrain")
    assert (pretrained.constraint, pretrained.bits_per_weight) == ("full precision", 32)
    assert {summary.full_precision_top1 for summary in summaries} == {pretrained.top1}
    for name in RUNS:
        config = json.loads((workdir / name / "config.json").read_text())
        assert config["experiment"] == "digits"
        assert "methods" not in config
        assert [row["epoch"] for row in read_metrics(workdir / name)][-1] in (4, 6)
        assert (workdir / name / "checkpoints").is_dir()
        assert list((workdir / name / "tensorboard").iterdir())
    for name in RUNS[1:]:
        assert config["pretrained"] == str(workdir / "pretrain")
        for figure in ("training", "weights_conv2_kernel", "weights_conv3_kernel"):
            png = workdir / name / "figures" / f"{figure}.png"
            assert png.read_bytes().startswith(b"\x89PNG")


def test_the_table_and_the_figure_have_all_methods(finished):
    workdir, summaries = finished
    table = (workdir / "table.md").read_text().splitlines()
    for line, summary, method in zip(table[2:], summaries, ("STE", "CBP"), strict=True):
        assert line.startswith(f"| ternary    | {method} ")
        assert f"{summary.top1:.2%}" in line
    assert (workdir / "figures" / "ternary.png").read_bytes().startswith(b"\x89PNG")


def test_the_entries_of_a_config():
    config = digits_study(constraint="all")
    names = [entry.name for entry in study.entries(config)]
    assert names == [n for c in cbp_jax.CONSTRAINTS for n in (f"{c}_ste", c)]
    config.methods = ("no_window",)
    config.constraint = "binary"
    (entry,) = study.entries(config)
    assert entry == ("binary_no_window", {"constraint": "binary", "method": "no_window"})


def test_full_precision_runs_once_whatever_the_constraints():
    names = [
        e.name for e in study.entries(digits_study(constraint="all", methods=("full_precision",)))
    ]
    assert names == ["full_precision"]
    both = study.entries(digits_study(methods=("parq", "full_precision")))
    assert [entry.name for entry in both] == ["full_precision", "ternary_parq"]


def test_finished_runs_are_not_repeated(finished, tmp_path, capsys):
    """Not even after the folder has moved, but they are not mistaken for others."""
    workdir = shutil.copytree(finished[0], tmp_path / "study")
    times = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*.json*")}
    (workdir / "table.md").unlink()
    assert study.run(digits_study(), workdir) == finished[1]
    assert "ternary_ste: finished before" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/*.json*")} == times
    assert (workdir / "table.md").read_text() == (finished[0] / "table.md").read_text()
    with pytest.raises(ValueError, match=r"finished run of another config .*learning_rate"):
        study.run(digits_study(learning_rate=0.5), workdir)


def test_a_stopped_study_resumes(finished, tmp_path, monkeypatch):
    """Stopped in the second of its three runs."""
    step, counted = loop.Meter.step, iter(range(1, 1000))

    def step_and_interrupt(meter, loss):
        step(meter, loss)
        if next(counted) == 4 * 10 + 33:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Meter, "step", step_and_interrupt)
    with pytest.raises(loop.Stopped) as stopped:
        study.run(digits_study(), tmp_path)
    assert stopped.value.code == 130
    assert not (tmp_path / "ternary").exists()
    monkeypatch.undo()
    summaries = study.run(digits_study(), tmp_path)
    for summary, expected in zip(summaries, finished[1], strict=True):
        for name in ("top1", "top5", "cfs", "cfs_relative", "file_top1"):
            assert getattr(summary, name) == getattr(expected, name), name
    table = (tmp_path / "table.md").read_text()
    assert table == (finished[0] / "table.md").read_text()


def test_the_folder_of_a_study_is_no_run(finished, environment):
    code, printed = run_script("evaluate.py", f"--workdir={finished[0]}", environment=environment)
    assert code == 1
    assert "is not the workdir of a run; name one of its runs: " in printed
    assert str(finished[0] / "ternary_ste") in printed


@pytest.mark.slow
def test_a_study_killed_three_times_resumes(finished, environment, tmp_path):
    """By SIGKILL: while it pre-trains, in the first run, and in the second."""
    arguments = study_command(tmp_path, checkpoint_epochs=1)
    for path in ("pretrain/checkpoints/10", "ternary_ste/checkpoints/20", "ternary/checkpoints/30"):
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 300
        while not (tmp_path / path).is_dir():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert not (tmp_path / path).parents[1].joinpath("summary.json").exists()
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = tmp_path / "never_killed"
    done = subprocess.run(
        study_command(whole, checkpoint_epochs=1), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "table.md").read_text() == (whole / "table.md").read_text()


@pytest.mark.slow
def test_main_job_meets_every_constraint(environment, tmp_path):
    """As a user runs it: all four constraints met, and almost no accuracy lost."""
    code, printed = run_script("digits.py", f"--workdir={tmp_path}", environment=environment)
    assert code == 0, printed[-3000:]
    for constraint in cbp_jax.CONSTRAINTS:
        summary = Summary.read(tmp_path / constraint)
        assert summary.cfs_relative < 0.01, constraint
        assert summary.top1 > summary.full_precision_top1 - 0.02, constraint
