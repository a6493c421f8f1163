"""What is read back from GGUF files is `quantize(params, opt_state)`, to the bit."""

import doctest
import sys
import tracemalloc

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from gguf_support import (
    CONSTRAINTS,
    assert_same_bits,
    export,
    export_kernel,
    link,
    normal,
    read,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import cbp_jax
from cbp_jax.deploy import gguf_export
from cbp_jax.deploy.gguf_blocks import BLOCK_TYPES

# Exactness


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scale_axis", [None, -1])
@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_weights_are_exact(kind, scale_axis, dtype, tmp_path):
    kernel = jnp.asarray(normal(256, 6) * np.float32([1, 2, 3, 4, 5, 1e-2]), dtype)
    deviation, wanted = export_kernel(
        tmp_path / "m", kernel, CONSTRAINTS[kind], scale_axis=scale_axis, weight_type=kind
    )
    ((name, (found, weights)),) = read(tmp_path / "m").items()
    assert (name, found, deviation) == ("blk.0.ffn_up.weight", kind, 0.0)
    assert_same_bits(weights, wanted.T)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_weights_are_exact(data, tmp_path_factory):
    """Of any shape, type, dtype and scales, and from levels, midpoints, zeros of both signs."""
    kind = data.draw(st.sampled_from(sorted(BLOCK_TYPES)))
    rows = BLOCK_TYPES[kind].size * data.draw(st.integers(1, 2))
    outputs, layers = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([None, 1, 3]))
    dtype = data.draw(st.sampled_from([np.float32, np.float16, jnp.bfloat16]))
    shape = (*([layers] if layers else []), rows, outputs)
    axes = data.draw(st.sampled_from([None, -1, *([0, (0, -1)] if layers else [])]))
    halves = st.floats(2.0**-12, 100, width=16)
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    grid = rng.choice(np.float32([-3, -1, -0.75, -0.5, -0.0, 0.0, 0.1, 0.25, 0.5, 1]), shape)
    grid.reshape(-1)[0] = 1

    def scale_fn(w, kept):
        wanted = tuple(n if axis in kept else 1 for axis, n in enumerate(w.shape))
        count = int(np.prod(wanted)) if kept else 1
        drawn = data.draw(st.lists(halves, min_size=count, max_size=count))
        return jnp.float32(drawn).reshape(wanted if kept else ())

    params = {"kernel": jnp.asarray(grid, dtype)}
    rule = cbp_jax.ste(CONSTRAINTS[kind], mask=True, scale_axis=axes, scale_fn=scale_fn)
    state = rule.init(params)
    path = tmp_path_factory.mktemp("gguf") / "m"
    name = "blk.{}.w" if layers else "w"
    assert export(path, params, state, {"kernel": name}, weight_type=kind) == 0.0
    wanted = np.asarray(cbp_jax.quantize(params, state)["kernel"])
    tensors = read(path)
    assert len(tensors) == (layers or 1)
    for layer in range(layers or 1):
        found, weights = tensors[name.replace("{}", str(layer))]
        assert found == kind
        assert_same_bits(weights, (wanted[layer] if layers else wanted).T)


def test_default_types_and_those_of_leaves(tmp_path):
    params = {name: {"kernel": normal(256, 4)} for name in ("a", "b", "c", "d", "e")}
    masks = {"a": "binary", "b": "ternary", "c|d|e": "one_bit_shift"}
    links = [link(rule, f"({mask})/kernel") for mask, rule in masks.items()]
    state = optax.chain(*links).init(params)
    asked = {"d/kernel": "F16", "e/kernel": "F32"}
    assert export(tmp_path / "m", params, state, lambda path: path, weight_type=asked) == 0.0
    tensors = read(tmp_path / "m")
    assert [kind for kind, _ in tensors.values()] == ["Q1_0", "TQ2_0", "Q4_0", "F16", "F32"]
    for name, wanted in cbp_jax.quantize(params, state).items():
        assert_same_bits(tensors[f"{name}/kernel"][1], wanted["kernel"].T)


def test_other_leaves(tmp_path):
    """As they are, F16 only with two axes, and transposed only if they are kernels."""
    params = {
        "head": {"kernel": normal(8, 3), "bias": normal(3)},
        "embed": {"embedding": jnp.asarray(normal(5, 8), jnp.bfloat16)},
        "up": {"kernel": normal(256, 4)},
        "step": jnp.float32(3),
    }
    state = link("ternary", "up/kernel").init(params)
    assert export(tmp_path / "m", params, state, lambda path: path) == 0.0
    tensors = read(tmp_path / "m")
    assert {name for name, (kind, _) in tensors.items() if kind != "F32"} == {"up/kernel"}
    assert_same_bits(tensors["head/kernel"][1], params["head"]["kernel"].T)
    assert_same_bits(tensors["embed/embedding"][1], params["embed"]["embedding"])
    assert_same_bits(tensors["head/bias"][1], params["head"]["bias"])
    assert tensors["step"][1] == 3

    options = {"other_type": "F16", "transpose": "embed/.*"}
    deviation = export(
        tmp_path / "m", params, state, lambda path: path, weight_type="F32", **options
    )
    assert 0 < deviation <= 2.0**-11
    tensors = read(tmp_path / "m")
    kinds = {"head/kernel": "F16", "embed/embedding": "F16", "up/kernel": "F32"}
    assert {name: tensors[name][0] for name in kinds} == kinds
    assert (tensors["head/bias"][0], tensors["step"][0]) == ("F32", "F32")
    assert_same_bits(tensors["embed/embedding"][1], params["embed"]["embedding"].T)
    assert_same_bits(tensors["head/kernel"][1], params["head"]["kernel"].astype(np.float16))


def test_weights_rounded_to_8_bits(tmp_path):
    """Of full precision: integers of a float16 scale in blocks of 32, of tensors with two axes."""
    params = {
        "up": {"kernel": normal(64, 3), "bias": normal(64)},
        "embed": {"embedding": jnp.asarray(normal(5, 32), jnp.bfloat16)},
    }
    deviation = export(tmp_path / "m", params, None, lambda path: path, other_type="Q8_0")
    assert 0 < deviation <= 2.0**-8
    tensors = read(tmp_path / "m")
    assert [kind for kind, _ in tensors.values()] == ["Q8_0", "F32", "Q8_0"]
    assert_same_bits(tensors["up/bias"][1], params["up"]["bias"])
    embedding = np.asarray(params["embed"]["embedding"], np.float32)
    for name, wanted in (("up/kernel", params["up"]["kernel"].T), ("embed/embedding", embedding)):
        blocks = np.float64(wanted).reshape(-1, 32)
        step = np.abs(blocks).max(axis=1, keepdims=True) / 127
        read_back = tensors[name][1].reshape(-1, 32)
        # Half a step of rounding, and the rounding of 127 steps to float16.
        assert (np.abs(read_back - blocks) <= (0.5 + 127 * 2.0**-11) * step * 1.001).all()
        integers = read_back / step.astype(np.float16)
        np.testing.assert_allclose(integers, np.round(integers), atol=1e-4)


def test_full_precision_has_no_state(tmp_path):
    kernel = {"kernel": normal(64, 3)}
    for other_type, dtype in (("F32", np.float32), ("F16", np.float16)):
        export(tmp_path / "m", kernel, None, lambda path: path, other_type=other_type)
        ((kind, weights),) = read(tmp_path / "m").values()
        assert kind == other_type
        assert_same_bits(weights, kernel["kernel"].T.astype(dtype))


def test_scales_that_float16_rounds(tmp_path):
    scale = 1 + 2.0**-11 + 2.0**-20  # above the middle between 1 and 1 + 2^-10
    deviation, wanted = export_kernel(
        tmp_path / "m", normal(256, 2, scale=1.0), scale_fn=lambda w, axes: scale
    )
    assert deviation == pytest.approx((1 + 2.0**-10) / scale - 1)
    _, weights = read(tmp_path / "m")["blk.0.ffn_up.weight"]
    assert np.array_equal(weights, np.sign(wanted.T) * (1 + 2.0**-10))


@pytest.mark.parametrize("scale", [1e-9, 1e5])
@pytest.mark.parametrize("kind", ["TQ2_0", "F16"])
def test_scales_that_float16_cannot_hold(kind, scale, tmp_path):
    with pytest.raises(ValueError, match=f"'up/kernel' as {kind} would differ by"):
        export_kernel(
            tmp_path / "m",
            normal(256, 2, scale=scale),
            scale_fn=lambda w, axes: scale,
            weight_type=kind,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_small_scale_beside_a_large_one(tmp_path):
    """The difference is relative to the row."""
    scales = np.float32([[1.0, 1e-9]])
    with pytest.raises(ValueError, match="'up/kernel' as TQ2_0 would differ by 1 of"):
        export_kernel(
            tmp_path / "m",
            normal(256, 2, scale=1.0) * scales,
            scale_axis=-1,
            scale_fn=lambda w, axes: scales,
        )


def test_bfloat16_weights_with_uneven_steps(tmp_path):
    """Their multiples of a step are rounded to 8 bits each."""
    kernel = jnp.asarray(normal(256, 4), jnp.bfloat16)
    deviation, _ = export_kernel(tmp_path / "m", kernel, cbp_jax.uniform(4))
    assert 2.0**-11 < deviation <= 2.0**-7


def test_float64(tmp_path):
    with jax.enable_x64(True):
        deviation, wanted = export_kernel(tmp_path / "m", jnp.asarray(normal(256, 2), float))
    assert (deviation, wanted.dtype) == (0.0, np.float64)
    assert_same_bits(read(tmp_path / "m")["blk.0.ffn_up.weight"][1], wanted.T)


def test_zeros(tmp_path):
    """A channel without a scale, blocks of zeros, and both signs of zero."""
    kernel = normal(512, 3)
    kernel[:, 0] = 0
    kernel[:256, 1] = -0.0
    for kind in ("TQ2_0", "TQ1_0", "Q4_0"):
        deviation, wanted = export_kernel(tmp_path / "m", kernel, scale_axis=-1, weight_type=kind)
        assert deviation == 0.0
        assert_same_bits(read(tmp_path / "m")["blk.0.ffn_up.weight"][1], wanted.T)
        assert not wanted[:256, :2].any()


def test_levels_in_other_units(tmp_path):
    """Steps that float16 rounds; a lopsided set; a zero point that no integer is."""
    deviation, _ = export_kernel(tmp_path / "m", normal(256, 4), cbp_jax.uniform(3))
    assert 0 < deviation <= 2.0**-11
    lopsided = cbp_jax.Constraint("lopsided", (-1.0, 0.5))
    assert export_kernel(tmp_path / "m", normal(256, 4), lopsided)[0] == 0.0
    assert read(tmp_path / "m")["blk.0.ffn_up.weight"][0] == "Q4_0"
    for constraint in (cbp_jax.uniform(8), cbp_jax.shift(3), cbp_jax.shift(40)):
        with pytest.raises(ValueError, match=r"(integers|common unit).*weight_type as 'F32'"):
            export_kernel(tmp_path / "n", normal(256, 4), constraint)
    assert export_kernel(tmp_path / "m", normal(256, 4), "one_bit_shift", weight_type="F16")[0] == 0


def test_nnx_and_equinox(tmp_path):
    """The axes of Flax's embeddings and kernels, and of Equinox's weights, come out right."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(7, 256, rngs=rngs)
            self.up = nnx.Linear(256, 3, use_bias=False, rngs=rngs)

    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    state = link("binary").init(params)
    names = {"embed/embedding": "token_embd.weight", "up/kernel": "up"}
    for tree in (params, nnx.to_pure_dict(params), model):
        assert export(tmp_path / "m", tree, state, names) == 0.0
        tensors = read(tmp_path / "m")
        assert_same_bits(tensors["token_embd.weight"][1], model.embed.embedding[...])
        assert_same_bits(tensors["up"][1], cbp_jax.quantize(params, state).up.kernel[...].T)

    linear = eqx.nn.Linear(128, 3, use_bias=False, key=jax.random.key(0))
    state = link("binary").init(linear)
    assert export(tmp_path / "m", linear, state, {"weight": "up"}) == 0.0
    assert_same_bits(read(tmp_path / "m")["up"][1], cbp_jax.quantize(linear, state).weight)


def test_layers_stacked_for_scan(tmp_path):
    params = {"layers": {"up": {"kernel": normal(3, 256, 2)}, "norm": {"scale": normal(3, 8)}}}
    state = link("ternary", scale_axis=0).init(params)
    names = {"layers/up/kernel": "blk.{}.up", "layers/norm/scale": "blk.{}.norm"}
    assert export(tmp_path / "m", params, state, names) == 0.0
    tensors = read(tmp_path / "m")
    wanted = cbp_jax.quantize(params, state)["layers"]["up"]["kernel"]
    for layer in range(3):
        assert_same_bits(tensors[f"blk.{layer}.up"][1], wanted[layer].T)
        assert_same_bits(tensors[f"blk.{layer}.norm"][1], params["layers"]["norm"]["scale"][layer])
    with pytest.raises(ValueError, match=r"'layers/up/kernel' has shape \(3, 256, 2\).*blk\.\{\}"):
        export(tmp_path / "n", params, state, names | {"layers/up/kernel": "up"})


# The file


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path, monkeypatch):
    path = tmp_path / "m"
    path.write_text("old")

    right = BLOCK_TYPES["TQ2_0"]
    wrong = right._replace(pack=lambda codes: right.pack(codes[:, ::-1]))
    monkeypatch.setitem(gguf_export.BLOCK_TYPES, "TQ2_0", wrong)
    with pytest.raises(ValueError, match="'up/kernel' as TQ2_0 would differ"):
        export_kernel(path, normal(256, 2))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_memory_is_that_of_one_tensor(tmp_path):
    layers, size = 32, 256 * 256
    params = {"kernel": jnp.asarray(normal(layers, 256, 256)), "free": normal(layers, 256, 256)}
    state = link("ternary", "kernel", scale_axis=(0, -1)).init(params)
    names = {"kernel": "blk.{}.kernel", "free": "blk.{}.free"}
    export(tmp_path / "m", params, state, names)  # JAX compiles
    tracemalloc.start()
    export(tmp_path / "m", params, state, names)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 32 * size < layers * size * 4


def test_two_files_are_equal(tmp_path):
    for name in ("a", "b"):
        export_kernel(tmp_path / name, normal(256, 2))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_gguf(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install \"cbp_jax\[gguf\]\""):
        export_kernel(tmp_path / "m", normal(256, 2))


def test_the_docstring(tmp_path, monkeypatch):
    """The doctests skip it, since they must run without gguf."""
    monkeypatch.chdir(tmp_path)
    text = cbp_jax.export_gguf.__doc__.replace("# doctest: +SKIP", "")
    example = doctest.DocTestParser().get_doctest(text, {}, "export_gguf", None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0
    assert (tmp_path / "model.gguf").exists()
