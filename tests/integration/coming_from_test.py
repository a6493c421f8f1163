"""docs/coming_from.md: every call in the last columns of its tables is run, in order."""

import ast
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pages import ROOT

import cbp_jax

_CODE = re.compile(r"`([^`]+)`")


def sections():
    """The code in the last column of each section's table, by the section's heading."""
    found = {}
    page = (ROOT / "docs" / "coming_from.md").read_text()
    for section in page.split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
        found[heading] = [code for row in rows for code in _CODE.findall(row.split(" | ")[-1])]
    return found


def model_fn(params, x):
    for name in ("conv1", "mlp", "head"):
        x = x @ params[name]["kernel"]
    return x + params["head"]["bias"]


@pytest.fixture
def user():
    """What the reader has: a network, its loss, and a mask."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"conv1": (8, 256), "mlp": (256, 16), "head": (16, 3)}
    params = {
        name: {"kernel": jax.random.normal(key, shape) / 8}
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    params["head"]["bias"] = jnp.zeros(3)
    x = jax.random.normal(keys[3], (32, 8))
    return {
        "cbp_jax": cbp_jax,
        "jax": jax,
        "jnp": jnp,
        "optax": optax,
        "params": params,
        "x": x,
        "model_fn": model_fn,
        "loss_fn": lambda params: jnp.mean((model_fn(params, x) - 1) ** 2),
        "mask": cbp_jax.select(include="mlp/kernel"),
        "names": {f"{name}/kernel": f"{name}.weight" for name in shapes}
        | {"head/bias": "head.bias"},
        "metadata": {"general.architecture": "llama"},
    }


@pytest.mark.parametrize("heading", sections())
def test_calls(heading, user, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = sections()[heading]
    assert len(calls) >= 4
    for code in calls:
        if code.startswith("--config."):
            check_flag(code)
        elif code.startswith("experiments/"):
            assert (ROOT / code).is_file()
        elif code.startswith("cbp_jax.export_gguf"):
            pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[gguf]"')
            assert run(code, user) < 1e-3
        else:
            result = run(code, user)
            if isinstance(result, optax.GradientTransformation):
                result.init(user["params"])


def run(code, names):
    """Executes statements; returns the value if they are one expression."""
    if isinstance(ast.parse(code).body[0], ast.Expr):
        return eval(code, names)
    return exec(code, names)


def check_flag(flag):
    """Sets a field of the config, which must be there, and settles the config."""
    pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')
    from common.config import base_config
    from common.training.settle import settle

    name, value = flag.removeprefix("--config.").split("=")
    config = base_config("", "resnet18")
    config.update({"learning_rate": 1e-3, "pretrained": "random"})
    assert name in config
    setattr(config, name, type(config[name])(value))
    settle(config)


def test_bitnet(user):
    """Ten steps as BitNet's: the scale of each step, rounding, the straight-through gradient."""
    rate, loss_fn = 0.05, user["loss_fn"]

    def absmean(w):
        scale = jnp.mean(jnp.abs(w))
        return w + jax.lax.stop_gradient(jnp.clip(jnp.round(w / scale), -1, 1) * scale - w)

    def bitnet_loss(params):
        return loss_fn(params | {"mlp": {"kernel": absmean(params["mlp"]["kernel"])}})

    theirs = ours = user["params"]
    state = cbp_jax.ste("ternary", mask=user["mask"]).init(ours)
    for _ in range(10):
        theirs = jax.tree.map(lambda w, g: w - rate * g, theirs, jax.grad(bitnet_loss)(theirs))
        state = cbp_jax.refit_scales(ours, state)
        grads = jax.grad(loss_fn)(cbp_jax.quantize(ours, state))
        ours = jax.tree.map(lambda w, g: w - rate * g, ours, grads)
    np.testing.assert_allclose(ours["mlp"]["kernel"], theirs["mlp"]["kernel"], atol=1e-6)
    moved = jnp.abs(ours["mlp"]["kernel"] - user["params"]["mlp"]["kernel"])
    assert float(jnp.max(moved)) > 1e-3


def test_binary_levels_of_one(user):
    """Larq's levels are ±1 whatever the weights."""
    link = cbp_jax.ste("binary", mask=user["mask"], scale_fn=lambda w, kept_axes: jnp.ones(()))
    quantized = cbp_jax.quantize(user["params"], link.init(user["params"]))
    np.testing.assert_array_equal(jnp.unique(quantized["mlp"]["kernel"]), [-1, 1])
