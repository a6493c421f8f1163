"""The cost of importing, and the documentation of public names."""

import inspect
import json
import subprocess
import sys

import pytest

import cbp_jax

HEAVY = {
    *("flax", "equinox", "orbax", "grain", "tensorflow", "tensorflow_datasets", "ml_collections"),
    *("matplotlib", "sklearn", "chex", "onnx", "gguf", "torch"),
}
PUBLIC = {name: inspect.unwrap(getattr(cbp_jax, name)) for name in cbp_jax.__all__}
FUNCTIONS = [name for name, value in PUBLIC.items() if inspect.isfunction(value)]


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
    options = {"stdout": subprocess.PIPE, "text": True, "timeout": 120, "check": True}
    return json.loads(subprocess.run([sys.executable, "-c", SCRIPT], **options).stdout)


def test_import_and_use_are_light(fresh):
    assert {"jax", "cbp_jax"} <= set(fresh["imported"])
    assert HEAVY & set(fresh["imported"]) == set()
    assert HEAVY & set(fresh["used"]) == set()


def test_import_starts_no_device(fresh):
    """Flags and `jax.distributed` must still be possible."""
    assert not fresh["started"]


def test_all_is_complete():
    assert len(cbp_jax.__all__) == len(set(cbp_jax.__all__))
    assert [name for name in cbp_jax.__all__ if not hasattr(cbp_jax, name)] == []
    names = {name for name, value in vars(cbp_jax).items() if not inspect.ismodule(value)}
    assert {name for name in names if not name.startswith("_")} == set(cbp_jax.__all__)


@pytest.mark.parametrize("name", cbp_jax.__all__)
def test_docstring(name):
    doc = inspect.getdoc(getattr(cbp_jax, name))
    assert doc
    summary, *rest = doc.splitlines()
    assert summary[0].isupper() or summary[0] == "`"
    assert not any(rest[:1])  # a summary of one line, then an empty one
    # Not the docstring that Python gives to a named tuple.
    assert not doc.startswith(f"{name}(")


@pytest.mark.parametrize("name", [*FUNCTIONS, "Constraint"])
def test_docstring_of_a_function(name):
    doc = inspect.getdoc(PUBLIC[name])
    assert "Example:\n" in doc
    assert ">>> " in doc
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert ("Args:\n" in doc) == bool(parameters)
    for parameter in parameters:
        assert f"  {parameter}: " in doc, f"{parameter} is not described"
