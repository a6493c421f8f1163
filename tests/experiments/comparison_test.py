"""A comparison: trials choose on validation data, seeds run the choice, tables report."""

import json

import numpy as np
import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

import study as script
from common import comparison
from common.report import comparison as report
from common.report.workdir import METHODS, Summary, read_metrics
from run_support import digits_config

import cbp_jax

TRIALS = {"closing": ({"learning_rate": 1e-6}, {"learning_rate": 3e-2})}


def digits_comparison():
    base = digits_config(
        pretrained="",
        epochs=2,
        pretrain_epochs=4,
        steps_per_epoch=10,
        checkpoint_steps=0,
        validation_images=200,
        reestimate_batches=2,
        figures=False,
    )
    return comparison.Comparison(base, ("binary",), "binary", TRIALS, 1, "top1")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("comparison")
    comparison.run(digits_comparison(), workdir)
    return workdir


def test_the_best_trial_on_validation_data_is_chosen(finished):
    record = json.loads((finished / "binary" / "closing" / "chosen.json").read_text())
    trials = [Summary.read(finished / "binary" / "closing" / f"trial{n}") for n in range(2)]
    assert [trial["top1"] for trial in record["trials"]] == [trial.top1 for trial in trials]
    assert record["chosen"] == int(np.argmax([trial.top1 for trial in trials]))
    chosen = TRIALS["closing"][record["chosen"]]
    config = json.loads((finished / "binary" / "closing" / "seed0" / "config.json").read_text())
    assert config["learning_rate"] == chosen["learning_rate"]
    assert config["pretrained"] == str(finished / "pretrain" / "seed0")


def test_the_chosen_trial_is_the_run_of_the_first_seed(finished):
    folder = finished / "binary" / "closing"
    chosen = json.loads((folder / "chosen.json").read_text())["chosen"]
    assert Summary.read(folder / "seed0") == Summary.read(folder / f"trial{chosen}")


def test_rows_are_of_the_validation_images_and_the_summary_of_the_test_images(finished):
    folder = finished / "binary" / "closing" / "seed0"
    summary, rows = Summary.read(folder), read_metrics(folder)
    assert summary.top1 == rows[-1]["top1"]
    assert (summary.top1 * 200) % 1 == pytest.approx(0, abs=1e-6)
    assert (summary.test_top1 * 899) % 1 == pytest.approx(0, abs=1e-3)
    assert summary.cfs == 0
    assert "lagrangian" not in rows[-1]
    assert rows[-1]["window"] is None  # infinite


def test_finished_cells_are_not_repeated(finished, capsys):
    before = (finished / "binary" / "closing" / "seed0" / "summary.json").read_bytes()
    comparison.run(digits_comparison(), finished)
    assert (finished / "binary" / "closing" / "seed0" / "summary.json").read_bytes() == before
    assert capsys.readouterr().out.count("finished before") == 4


def test_tables_and_figures(finished, tmp_path):
    summary = Summary.read(finished / "binary" / "closing" / "seed0")
    row = report.results_table(finished).splitlines()[2]
    assert row.startswith(f"| CBP, closing | {100 * summary.test_top1:.2f} ")
    assert "learning_rate" in report.tuning_table(finished)
    report.plot_accuracy_against_bits(tmp_path / "bits.png", "digits", finished)
    report.plot_over_steps(tmp_path / "steps.png", "digits", finished, "binary")
    for name in ("bits", "steps"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_spread_is_the_sample_deviation():
    assert report.spread([1.0, 2.0, 4.0]) == f"{7 / 3:.2f} ± {np.sqrt(7 / 3):.2f}"
    assert report.spread([1.0]) == "1.00"


@pytest.mark.parametrize("ground", ["fashion_mnist", "resnet20", "text_llama"])
def test_each_method_has_as_many_trials(ground):
    config = script.get_config()
    config.ground = ground
    made = script.comparison(config)
    assert set(made.trials) == set(METHODS)
    assert {len(trials) for trials in made.trials.values()} == {6}
    for trials in made.trials.values():
        assert all(name in made.base for trial in trials for name in trial)
    assert tuple(made.constraints) == cbp_jax.CONSTRAINTS


def test_the_ablation_varies_closing_alone():
    config = script.get_config()
    config.ablation = True
    made = script.comparison(config)
    assert {trial["method"] for (trial,) in made.trials.values()} == {"closing"}
    assert len({(t["closes_at"], t["strength"]) for (t,) in made.trials.values()}) == len(
        made.trials
    )
