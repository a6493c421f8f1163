"""What importing costs, and that the public names are documented."""

import inspect
import json
import subprocess
import sys

import pytest

import cbp_jax

HEAVY = [
    "flax", "equinox", "orbax", "grain", "tensorflow", "tensorflow_datasets", "ml_collections", "matplotlib", "sklearn", "chex",
    "onnx", "torch",
]  # fmt: skip
FUNCTIONS = [
    name for name in cbp_jax.__all__ if inspect.isfunction(inspect.unwrap(getattr(cbp_jax, name)))
]


SCRIPT = """
import json, sys
import cbp_jax, jax
imported, started = sorted(sys.modules), jax._src.xla_bridge.backends_are_initialized()
params = {"w": jax.numpy.ones((2, 2))}
state = cbp_jax.cbp_sgd(0.1, cbp_jax.uniform(3)).init(params)
cbp_jax.quantize(params, state), str(cbp_jax.layer_report(params, state))
print(json.dumps({"imported": imported, "started": started, "used": sorted(sys.modules)}))
"""


@pytest.fixture(scope="module")
def fresh():
    """What a new Python has loaded, having imported the library and having used it."""
    return json.loads(
        subprocess.run(
            [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=True
        ).stdout
    )


def test_import_is_light(fresh):
    assert {"jax", "cbp_jax"} <= set(fresh["imported"])
    assert [name for name in HEAVY if name in fresh["imported"]] == []


def test_use_needs_none_of_them_either(fresh):
    assert [name for name in HEAVY if name in fresh["used"]] == []


def test_import_starts_no_device(fresh):
    """Flags and `jax.distributed` must still be possible after it."""
    assert not fresh["started"]


def test_all_is_complete():
    assert len(cbp_jax.__all__) == len(set(cbp_jax.__all__))
    assert [name for name in cbp_jax.__all__ if not hasattr(cbp_jax, name)] == []
    public = {
        name
        for name, value in vars(cbp_jax).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(cbp_jax.__all__)


@pytest.mark.parametrize("name", cbp_jax.__all__)
def test_docstring(name):
    doc = inspect.getdoc(getattr(cbp_jax, name))
    assert doc
    summary, *rest = doc.splitlines()
    assert summary[0].isupper() or summary[0] == "`"
    assert not any(rest[:1])  # one line of summary, then an empty one
    # named tuples get a docstring from Python: theirs must be written
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", [*FUNCTIONS, "Constraint"])
def test_docstring_of_a_function(name):
    function = inspect.unwrap(getattr(cbp_jax, name))
    doc = inspect.getdoc(function)
    assert "Example:\n" in doc
    assert ">>> " in doc
    parameters = inspect.signature(function).parameters
    assert ("Args:\n" in doc) == bool(parameters)
    for parameter in parameters:
        assert f"  {parameter}: " in doc, f"{parameter} is not described"
