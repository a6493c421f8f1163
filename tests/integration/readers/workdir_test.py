"""What a run leaves in its workdir, damaged."""

import json

import pytest
from common.config import ConfigError, base_config
from common.report.workdir import Summary
from common.training.restore import read_config
from corruption import cases, check_reader
from faults import reader_cases


@cases()
def test_configs(cases):
    check_reader("config.json", cases)


@cases()
def test_summaries(cases):
    check_reader("summary.json", cases)


@cases()
def test_metrics(cases):
    check_reader("metrics.jsonl", cases)


@cases(default=100)  # a hundredth of a second each where nothing else runs, and far more elsewhere
def test_checkpoints(cases):
    check_reader("checkpoints", cases)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patience", "20"),
        ("image_size", None),
        ("window_factor", [[]]),
        ("a.b", 1),
        ("learning_rate", 10**400),
    ],
)
def test_a_config_with_a_field_of_another_type(name, value, tmp_path):
    """Each raised an error of other libraries, or made one later."""
    fields = json.loads(base_config("fashion_mnist", "small_mlp").to_json_best_effort())
    text = json.dumps({**fields, "learning_rate": 0.1, name: value})
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match=r"config\.json is damaged, or of another version"):
        read_config(tmp_path, {})


@pytest.mark.parametrize(
    ("name", "value"),
    [("top1", "0.9"), ("top1", None), ("seed", 0.5), ("seed", True), ("multipliers", {"a": "b"})],
)
def test_a_summary_with_a_field_of_another_type(name, value, tmp_path):
    """It was read, and ended the tables."""
    fields = json.loads(reader_cases.summary_text())
    (tmp_path / "summary.json").write_text(json.dumps(fields | {"top5": 1}))
    assert Summary.read(tmp_path).top5 == 1  # of a float, JSON may drop the point
    (tmp_path / "summary.json").write_text(json.dumps(fields | {name: value}))
    with pytest.raises(ValueError, match=rf"summary\.json is damaged, .*{name} is "):
        Summary.read(tmp_path)
