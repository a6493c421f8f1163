"""The benchmarks' arithmetic, and that their page matches their results; nothing is timed."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("ml_collections", reason="needs the extra experiments")
from benchmarks import authors, compiled, page, timing, weights
from benchmarks.steps import Step, make_step

import cbp_jax

# Stands in for the part of the authors' module that the loop around it uses.
STAND_IN = """
import torch
class QLinear:
    def __init__(self, fan_in, fan_out, mode):
        self.factor, self.b, self.df = {"bin": [-1, 1]}[mode], [0], [2]
class constraint:
    @staticmethod
    def apply(w, scale, factor, b, ucs):
        return 2 * (w - torch.sign(w) * scale).abs()
"""


def test_turns_alternate_and_ratios_are_medians_over_turns(monkeypatch):
    order, clock = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    candidates = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = timing.take_turns(candidates, turns=3)
    assert order == ["a", "b"] * 4  # once to warm up
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert timing.ratio({"a": [2.0, 30.0, 3.0], "b": [1.0, 10.0, 3.0]}, "a", "b") == 2


def test_resnet50_tree():
    shapes, mask = weights.resnet50()
    leaves, flags = jax.tree.leaves(shapes), jax.tree.leaves(mask(shapes))
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (161, 25_557_032)  # as torchvision's
    assert sum(flags) == 52  # 53 convolutions without the first
    count = sum(leaf.size for leaf in jax.tree.leaves(weights.dense(10_000_000)))
    assert count == pytest.approx(10_000_000, rel=1e-3)


def test_shape_bytes():
    assert compiled.shape_bytes("f32[3,4]{1,0}") == 48
    shape = "(f32[2]{0}, /*index=1*/bf16[4,2]{1,0:T(8,128)}, pred[])"
    assert compiled.shape_bytes(shape) == 8 + 16 + 1


def test_compiled_step_is_counted():
    """x + 1 reads and writes one word; x + y and 2 x read and write two, in one kernel or two."""
    x = jnp.ones((64, 64))
    row = compiled.describe(jax.jit(lambda x: x + 1).lower(x).compile(), x.nbytes, 4)
    assert (row["kernels"], row["copies"], row["loops"]) == (1, 0, 0)
    assert row["words"] == pytest.approx(2, abs=0.01)
    row = compiled.describe(jax.jit(lambda x, y: (x + y, 2 * x)).lower(x, x).compile(), x.nbytes, 4)
    assert row["words"] == pytest.approx(4 if row["kernels"] == 1 else 5, abs=0.01)


def test_timed_step_is_that_of_optax():
    params, grads = {"w": jnp.array([[0.5, -0.2]])}, {"w": jnp.array([[1.0, 2.0]])}
    step = Step(optax.sgd(0.1), params, grads, with_value=False, count=3)
    np.testing.assert_allclose(step()[0]["w"], [[0.2, -0.8]], rtol=1e-6)
    np.testing.assert_array_equal(params["w"], np.float32([[0.5, -0.2]]))  # it copied them
    state = cbp_jax.cbp("binary").init(params)
    _, state = make_step(cbp_jax.cbp("binary"), with_value=True)(
        jax.tree.map(jnp.copy, params), state, grads, jnp.float32(2)
    )
    # A violation of 0.3, because 0.5 is 0.15 above its level.
    np.testing.assert_allclose(state.lagrangian_sum, 2 + 1e-4 * 0.3, rtol=1e-7)


def test_authors_step_descends_loss_and_constraint(tmp_path, monkeypatch):
    """With a stand-in module; multipliers of 1e-3 give a gradient of 2e-3 towards the level."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)  # replaced where there is no CUDA
    (tmp_path / "module.py").write_text(STAND_IN)
    params = {"a": np.float32([[0.5, 0.1]]), "b": np.float32([2.0])}
    grads = {"a": np.float32([[0.0, 0.0]]), "b": np.float32([1.0])}
    run = authors.steps(str(tmp_path), params, grads, {"a": True, "b": False}, ["binary"], 1)
    assert list(run) == [authors.PLAIN, "their step, binary"]
    plain, theirs = (
        [tensor.detach().numpy() for tensor in function()] for function in run.values()
    )
    np.testing.assert_allclose(plain[1], 2 - 1e-3, rtol=1e-6)
    np.testing.assert_array_equal(plain[0], params["a"])
    np.testing.assert_allclose(theirs[0], params["a"] - np.float32([[2e-6, -2e-6]]), rtol=1e-6)
    np.testing.assert_allclose(theirs[1], 2 - 1e-3, rtol=1e-6)


def test_rejects_folder_that_is_not_a_clone(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError, match="dooseokjeong/CBP"):
        authors.load(str(tmp_path))


def test_page_matches_results(monkeypatch, tmp_path):
    written = (page.HERE / "README.md").read_text()
    monkeypatch.setattr(page, "HERE", tmp_path)
    page.write()
    assert (tmp_path / "README.md").read_text() == written, (
        "run: cd experiments && python -m benchmarks --only="
    )


def test_every_result_names_device_and_version():
    for path in page.RESULTS.glob("*.json"):
        if path.stem not in ("compiled", "decoders", "onnx_runtime"):
            assert {"device", "jax"} <= json.loads(path.read_text()).keys(), path.name
