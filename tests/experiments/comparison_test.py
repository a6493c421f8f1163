"""A comparison: trials choose on validation data, seeds run the choice, tables report."""

import dataclasses
import json
import re

import numpy as np
import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("orbax.checkpoint", reason='needs the extra: pip install -e ".[test]"')

import study as script
from common import comparison, study
from common.config import ConfigError
from common.report import claims, layers, splitting
from common.report import comparison as report
from common.report.workdir import METHODS, Summary, read_metrics
from common.training import setup
from common.training.run import train_and_evaluate
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
    assert not (finished / "binary" / "closing" / "seed0" / "checkpoints").exists()


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


def test_a_trial_that_diverges_is_not_chosen(finished, monkeypatch):
    """Nor does it end the comparison, unless all of them do."""
    whole = study.finish

    def finish(base, workdir, entry):
        if entry.name.endswith(diverging):
            raise FloatingPointError("the loss is not finite")
        return whole(base, workdir, entry)

    monkeypatch.setattr(study, "finish", finish)
    record = finished / "binary" / "closing" / "chosen.json"
    before = record.read_text()
    diverging = "trial1"
    assert comparison.choose(digits_comparison(), finished, "closing") == 0
    assert json.loads(record.read_text())["trials"][1]["top1"] is None
    assert report.tuning_table(finished).count("diverged") == 1
    diverging = ("trial0", "trial1")
    with pytest.raises(FloatingPointError, match="each of the 2 trials of closing diverged"):
        comparison.choose(digits_comparison(), finished, "closing")
    record.write_text(before)


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


@pytest.mark.parametrize("ground", ["fashion_mnist", "resnet20", "llama"])
def test_each_method_has_as_many_trials(ground):
    config = script.get_config()
    config.ground = ground
    made = script.comparison(config)
    assert set(made.trials) == set(METHODS)
    assert {len(trials) for trials in made.trials.values()} == {6}
    for trials in made.trials.values():
        assert all(name in made.base for trial in trials for name in trial)
    assert tuple(made.constraints) == cbp_jax.CONSTRAINTS


def test_the_course_varies_closing_alone():
    config = script.get_config()
    config.variants = "course"
    made = script.comparison(config)
    assert {trial["method"] for (trial,) in made.trials.values()} == {"closing"}
    assert len({(t["closes_at"], t["strength"]) for (t,) in made.trials.values()}) == len(
        made.trials
    )


def test_the_layers_are_freed_in_turn():
    config = script.get_config()
    config.variants, config.methods = "layers", ("closing",)
    made = script.comparison(config)
    kernels = setup.every_kernel(made.base)
    assert len(kernels) == 5
    for name, ((trial,), free) in zip(
        made.trials, zip(made.trials.values(), (None, *kernels), strict=True), strict=True
    ):
        assert name == layers.variant("closing", free)
        pattern = ".*kernel" if trial["constrained"] == "all" else trial["constrained"]
        assert [k for k in kernels if not re.fullmatch(pattern, k)] == ([free] if free else [])


def test_rates_alone_tries_nothing_else():
    assert script.trials("closing", (0.1, 0.3), rates_alone=True) == [
        {"learning_rate": 0.1},
        {"learning_rate": 0.3},
    ]


@pytest.mark.parametrize(
    "field", [{"ground": "mnist"}, {"methods": ("st",)}, {"constraints": ("octal",)},
              {"variants": "layer"}]
)  # fmt: skip
def test_what_a_study_does_not_know(field):
    config = script.get_config()
    config.update(field)
    with pytest.raises(ConfigError, match=f"--config.{next(iter(field))}: .* is none of"):
        script.comparison(config)


def cell(method, accuracies, constraint="binary", multipliers=None, cfs=0.0):
    summaries = [
        Summary(
            experiment="digits", constraint=constraint, method=method, seed=seed,
            full_precision_top1=0.9, top1=accuracy, top5=1.0, cfs=cfs, cfs_relative=cfs,
            bits_per_weight=1, bytes_packed=1, bytes_float32=4, seconds=1.0,
            multipliers=multipliers,
        )
        for seed, accuracy in enumerate(accuracies)
    ]  # fmt: skip
    return report.Cell(constraint, method, summaries, [])


def write(folder, found):
    for constraint, method, summaries, _ in found:
        for summary in summaries:
            path = folder / constraint / method / f"seed{summary.seed}"
            path.mkdir(parents=True)
            (path / "summary.json").write_text(json.dumps(dataclasses.asdict(summary)))


def test_differences_are_paired_by_seed():
    found = report.difference(cell("cbp", (0.5, 0.6, 0.9)), cell("ste", (0.4, 0.5, 0.75)))
    assert found.mean == pytest.approx(35 / 3)
    assert found.error == pytest.approx(np.std([10, 10, 15], ddof=1) / np.sqrt(3))
    assert found.sign == 1
    alone = report.difference(cell("cbp", (0.5,)), cell("ste", (0.4, 0.5)))
    assert alone.sign == 0
    assert np.isnan(alone.error)


def test_claims(tmp_path):
    (tmp_path / "scratch").mkdir()
    write(
        tmp_path / "study",
        [
            cell("cbp", (0.80, 0.82), cfs=1e-4),
            cell("ste", (0.70, 0.72)),
            cell("no_window", (0.90, 0.91)),
            cell("full_precision", (0.80, 0.83), "full precision"),
        ],
    )
    lines = claims.claims_table(tmp_path / "study", tmp_path / "scratch").splitlines()[2:]
    answers = [[part.strip() for part in line.split("|")[1:3]] for line in lines]
    assert [(claim, answer.split(",")[0]) for claim, answer in answers] == [
        ("CBP is ahead of STE", "yes"),
        ("CBP is ahead of CBP without the window", "no"),
        ("STE is ahead of CBP without the window", "no"),
        ("CBP: CFS / scale is near 0", "yes"),
        ("CBP is within noise of full precision trained on", "yes"),
    ]


def test_claims_of_one_seed_are_open_and_a_loss_is_better_where_it_is_smaller(tmp_path):
    (tmp_path / "scratch").mkdir()
    write(tmp_path / "one", [cell("cbp", (0.3,)), cell("ste", (0.9,))])
    assert "| open, -60.00" in claims.claims_table(tmp_path / "one", tmp_path / "scratch")
    losses = [
        cell(method, (0.5, 0.5))._replace(
            summaries=[
                dataclasses.replace(summary, experiment="shakespeare_llama", eval_loss=loss)
                for summary in cell(method, (0.5, 0.5)).summaries
            ]
        )
        for method, loss in (("cbp", 1.0), ("ste", 2.0))
    ]
    write(tmp_path / "text", losses)
    table = claims.claims_table(tmp_path / "text", tmp_path / "scratch")
    assert "| CBP is ahead of STE        | yes, -1.00 ± 0.00 |" in table


def test_layers_are_ranked_by_multiplier_and_by_what_freeing_them_gives(tmp_path):
    means = {"a/kernel": 1.0, "b/kernel": 3.0, "c/kernel": 2.0}
    write(
        tmp_path,
        [
            cell(layers.variant("closing", None), (0.5, 0.5), multipliers=means),
            cell(layers.variant("closing", "a/kernel"), (0.52, 0.52)),
            cell(layers.variant("closing", "b/kernel"), (0.6, 0.6)),
            cell(layers.variant("closing", "c/kernel"), (0.51, 0.51)),
            cell(layers.variant("ste", None), (0.5, 0.5)),  # has no multipliers
        ],
    )
    rows = layers.layers_table(tmp_path).splitlines()[2:]
    shown = [[part.strip() for part in row.split("|")[2:5]] for row in rows]
    assert shown == [
        ["b/kernel", "3", "+10.00 ± 0.00"],
        ["c/kernel", "2", "+1.00 ± 0.00"],
        ["a/kernel", "1", "+2.00 ± 0.00"],
        ["rank correlation", "", "+0.50"],
    ]


def test_the_figure_of_weights_that_split(tmp_path):
    config = digits_config(
        constraint="binary",
        method="closing",
        epochs=3,
        pretrained="random",
        keep_weights=True,
        figures=False,
    )
    train_and_evaluate(config, tmp_path)
    steps, weights = splitting.weights_over_steps(tmp_path, "conv3/kernel")
    rows = read_metrics(tmp_path)
    assert list(steps) == [row["step"] for row in rows]
    assert set(rows[-1]["multiplier"]) == set(rows[-1]["violation"])
    np.testing.assert_allclose(np.abs(weights[-1]), 1, rtol=1e-6)
    np.testing.assert_allclose(
        np.mean(2 * np.abs(np.abs(weights[0]) - 1)), rows[0]["violation"]["conv3/kernel"], rtol=1e-5
    )
    path = tmp_path / "splitting.png"
    splitting.plot_splitting(path, "digits", {"closing": tmp_path}, "conv3/kernel", "binary")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FileNotFoundError, match="keep_weights"):
        splitting.weights_over_steps(path.parent / "checkpoints", "conv3/kernel")
