"""The commands and flags on the pages: the scripts exist, and have the fields and flags."""

import importlib
import re

import pytest
from pages import PAGES, ROOT

EXPERIMENTS = ROOT / "experiments"
_FIELD = re.compile(r"--config\.(\w+)")
_COMMAND = re.compile(r"python (?:experiments/)?(\w+)\.py((?:\\\n|[^\n])*)")


def fields(script):
    """The fields of a script's config."""
    pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
    return set(importlib.import_module(script).get_config())


def fences(page):
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_fields_exist(page):
    scripts = [
        path.stem for path in EXPERIMENTS.glob("*.py") if "def get_config" in path.read_text()
    ]
    known = set().union(*map(fields, scripts))
    assert set(_FIELD.findall(page.read_text())) <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_fit_their_scripts(page):
    for script, arguments in _COMMAND.findall(fences(page)):
        text = (EXPERIMENTS / f"{script}.py").read_text()
        asked = _FIELD.findall(arguments)
        if asked:
            assert set(asked) <= fields(script)
        for flag in re.findall(r"--(\w+)(?=[= ]|$)", _FIELD.sub("", arguments)):
            assert flag == "workdir" or f'"{flag}"' in text, f"{script}.py has no --{flag}"


def test_commands_are_found():
    imagenet = fences(ROOT / "docs" / "imagenet.md")
    commands = dict(_COMMAND.findall(imagenet))
    assert {"evaluate", "export", "imagenet_resnet50"} <= commands.keys()
    assert "coordinator" not in commands["imagenet_resnet50"]
    assert "--config.distributed" in commands["imagenet_resnet50"]  # the last of them
