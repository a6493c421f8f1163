"""The benchmarks' own arithmetic, and that their page is the one its results give; nothing here is timed."""

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

# The part of a module that the authors' has too, under its names: enough to run the loop around it.
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


def test_turns_interleave_and_ratios_are_medians_over_turns(monkeypatch):
    order, clock = [], itertools.count()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    seconds = timing.take_turns(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, turns=3
    )
    assert order == ["a", "b"] * 4  # once to warm up
    assert seconds == {"a": [1.0] * 3, "b": [1.0] * 3}
    assert timing.ratio({"a": [2.0, 30.0, 3.0], "b": [1.0, 10.0, 3.0]}, "a", "b") == 2


def test_the_tree_of_resnet50():
    shapes, mask = weights.resnet50()
    leaves, flags = jax.tree.leaves(shapes), jax.tree.leaves(mask(shapes))
    assert (len(leaves), sum(leaf.size for leaf in leaves)) == (161, 25_557_032)  # as torchvision's
    assert sum(flags) == 52  # 53 convolutions without the first
    assert sum(leaf.size for leaf in jax.tree.leaves(weights.dense(10_000_000))) == pytest.approx(
        10_000_000, rel=1e-3
    )


def test_bytes_of_types():
    assert compiled.shape_bytes("f32[3,4]{1,0}") == 48
    assert (
        compiled.shape_bytes("(f32[2]{0}, /*index=1*/bf16[4,2]{1,0:T(8,128)}, pred[])")
        == 8 + 16 + 1
    )


def test_what_a_compiled_step_is_said_to_do():
    """x + 1 reads one word and writes one; x + y and 2 x read two and write two, in one kernel or in two."""
    x = jnp.ones((64, 64))
    row = compiled.describe(jax.jit(lambda x: x + 1).lower(x).compile(), x.nbytes, 4)
    assert (row["kernels"], row["copies"], row["loops"]) == (1, 0, 0)
    assert row["words"] == pytest.approx(2, abs=0.01)
    row = compiled.describe(jax.jit(lambda x, y: (x + y, 2 * x)).lower(x, x).compile(), x.nbytes, 4)
    assert row["words"] == pytest.approx(4 if row["kernels"] == 1 else 5, abs=0.01)


def test_a_step_of_the_benchmark_is_one_of_optax():
    params, grads = {"w": jnp.array([[0.5, -0.2]])}, {"w": jnp.array([[1.0, 2.0]])}
    step = Step(optax.sgd(0.1), params, grads, with_value=False, count=3)
    np.testing.assert_allclose(step()[0]["w"], [[0.2, -0.8]], rtol=1e-6)
    np.testing.assert_array_equal(params["w"], np.float32([[0.5, -0.2]]))  # it has its own
    state = cbp_jax.cbp("binary").init(params)
    _, state = make_step(cbp_jax.cbp("binary"), with_value=True)(
        jax.tree.map(jnp.copy, params), state, grads, jnp.float32(2)
    )
    np.testing.assert_allclose(
        state.lagrangian_sum, 2 + 1e-4 * 0.3, rtol=1e-7
    )  # of 0.5, which is 0.15 outside the levels


def test_the_authors_step_descends_loss_and_constraint(tmp_path, monkeypatch):
    """With a module of the same names; multipliers 1e-3, so a gradient of 2e-3 towards the level."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(
        torch.Tensor, "cuda", torch.Tensor.cuda
    )  # which they need changed where there is none
    (tmp_path / "module.py").write_text(STAND_IN)
    params, grads = (
        {"a": np.float32([[0.5, 0.1]]), "b": np.float32([2.0])},
        {"a": np.float32([[0.0, 0.0]]), "b": np.float32([1.0])},
    )
    run = authors.steps(str(tmp_path), params, grads, {"a": True, "b": False}, ["binary"], 1)
    assert list(run) == [authors.PLAIN, "their step, binary"]
    plain, theirs = (
        [tensor.detach().numpy() for tensor in function()] for function in run.values()
    )
    np.testing.assert_allclose(plain[1], 2 - 1e-3, rtol=1e-6)
    np.testing.assert_array_equal(plain[0], params["a"])
    np.testing.assert_allclose(theirs[0], params["a"] - np.float32([[2e-6, -2e-6]]), rtol=1e-6)
    np.testing.assert_allclose(theirs[1], 2 - 1e-3, rtol=1e-6)


def test_a_clone_that_is_none(tmp_path):
    pytest.importorskip("torch")
    with pytest.raises(FileNotFoundError, match="dooseokjeong/CBP"):
        authors.load(str(tmp_path))


def test_the_page_is_what_its_results_give(monkeypatch, tmp_path):
    written = (page.HERE / "README.md").read_text()
    monkeypatch.setattr(page, "HERE", tmp_path)
    page.write()
    assert (tmp_path / "README.md").read_text() == written, (
        "run: cd experiments && python -m benchmarks --only="
    )


def test_every_result_has_its_device_and_version():
    for path in page.RESULTS.glob("*.json"):
        results = json.loads(path.read_text())
        assert {"device", "jax"} <= results.keys() or path.stem in (
            "compiled",
            "decoders",
            "onnx_runtime",
        ), path.name
