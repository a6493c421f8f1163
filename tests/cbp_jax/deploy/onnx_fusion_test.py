"""ONNX Runtime fuses each product by packed integers into a MatMulNBits, whatever follows it."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from onnx_support import assert_same_outputs, normal, onnxruntime, optimized_operators

import cbp_jax
from cbp_jax.deploy import onnx_export

WIDTH, LAYERS = 16, 3
X = normal(3, WIDTH)


def relu_by_hand(x):
    return jnp.maximum(x, 0)


ACTIVATIONS = {
    "none": lambda x: x,
    "relu": jax.nn.relu,
    "jitted relu": jax.jit(jax.nn.relu),
    "maximum": relu_by_hand,
    "relu6": jax.nn.relu6,
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "shifted relu": lambda x: jax.nn.relu(x + 1.0),
}


class Chain(nnx.Module):
    def __init__(self, activation, bias, norm, seed=0):
        rngs = nnx.Rngs(seed)
        init = nnx.initializers.normal()

        def dense():
            return nnx.Linear(WIDTH, WIDTH, use_bias=bias, bias_init=init, rngs=rngs)

        def batch_norm():
            return nnx.BatchNorm(WIDTH, bias_init=init, rngs=rngs) if norm else None

        self.layers = nnx.List([dense() for _ in range(LAYERS)])
        self.norms = nnx.List([batch_norm() for _ in range(LAYERS)])
        self.activation = activation

    def __call__(self, x):
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = layer(x)
            x = self.activation(x if norm is None else norm(x))
        return x


class Chains(nnx.Module):
    """A chain for each activation, side by side."""

    def __init__(self, bias):
        chains = [Chain(f, bias, norm=False, seed=i) for i, f in enumerate(ACTIVATIONS.values())]
        self.chains = nnx.List(chains)

    def __call__(self, x):
        return [chain(x) for chain in self.chains]


def export(model, path, weight_type="int4", scale_axis=None):
    params = nnx.state(model, nnx.Param)
    state = cbp_jax.cbp("ternary", scale_axis=scale_axis).init(params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime does not multiply")
        cbp_jax.export_onnx(model, params, state, X, path, weight_type)
    quantized = cbp_jax.quantize(model, state)
    quantized.eval()
    assert_same_outputs(path, nnx.jit(lambda x: quantized(x)), X)


def assert_fused(path, tmp_path, count=LAYERS):
    operators = optimized_operators(path, tmp_path)
    assert operators.count("MatMulNBits") == count, operators
    assert "DequantizeLinear" not in operators


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_chains_with_each_activation(bias, tmp_path):
    export(Chains(bias), tmp_path / "model.onnx")
    assert_fused(tmp_path / "model.onnx", tmp_path, count=LAYERS * len(ACTIVATIONS))


@pytest.mark.parametrize("weight_type", ["int4", "int2"])
@pytest.mark.parametrize("scale_axis", [None, -1])
@pytest.mark.parametrize("norm", [False, True], ids=["bias", "batch norm"])
def test_relu_with_each_type_and_scale(weight_type, scale_axis, norm, tmp_path):
    path = tmp_path / "model.onnx"
    export(Chain(jax.nn.relu, True, norm), path, weight_type, scale_axis)
    assert_fused(path, tmp_path)


def test_functions(tmp_path):
    """Biases that are added by hand, a residual, and a matrix that two products share."""
    params = {
        name: {"kernel": jnp.asarray(normal(WIDTH, WIDTH + i)[:, :WIDTH]), "bias": jnp.ones(WIDTH)}
        for i, name in enumerate("ab")
    }
    state = cbp_jax.cbp("binary").init(params)

    def model(params, x):
        y = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        y = y @ params["b"]["kernel"] + x
        return jax.nn.relu(y @ params["a"]["kernel"] + x[:1].sum())

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime does not multiply")
        cbp_jax.export_onnx(model, params, state, X, tmp_path / "model.onnx")
    assert_fused(tmp_path / "model.onnx", tmp_path)


def test_a_product_in_a_loop_is_unpacked_once(tmp_path):
    """Nothing is fused across a loop's border, so the weight is made where loading folds it."""
    params = {"kernel": jnp.asarray(normal(WIDTH, WIDTH))}
    state = cbp_jax.cbp("binary").init(params)

    def model(params, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["kernel"]), None), x, None, length=3)[
            0
        ]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime does not multiply")
        cbp_jax.export_onnx(model, params, state, X, tmp_path / "model.onnx")
    assert "DequantizeLinear" not in optimized_operators(tmp_path / "model.onnx", tmp_path)


WARNING = (
    r"does not multiply by the packed integers of 'first/kernel': .* unpack them when it loads them"
)


def export_what_is_not_fused(path, tmp_path, between):
    """One layer before what ONNX Runtime does not fuse, and one after it."""
    params = {
        "first": {"kernel": jnp.asarray(normal(WIDTH, 24))},
        "second": {"kernel": jnp.asarray(normal(24, 12))},
    }
    state = cbp_jax.cbp("ternary", scale_axis=-1).init(params)

    def model(params, x):
        return between(x, params["first"]["kernel"]) @ params["second"]["kernel"]

    with pytest.warns(UserWarning, match=WARNING):
        cbp_jax.export_onnx(model, params, state, X, path)
    quantized = cbp_jax.quantize(params, state)
    assert_same_outputs(path, lambda x: model(quantized, x), X)
    assert_fused(path, tmp_path, count=1)


@pytest.mark.parametrize(
    "between",
    [
        lambda x, w: jax.nn.relu((x @ w) * 1.0),
        lambda x, w: jax.nn.relu((x @ w) / 1.0),
        lambda x, w: (jnp.tanh(x).T @ x).T @ w + normal(24),
    ],
    ids=["times one", "over one", "transposed"],
)
def test_what_is_not_fused_is_named_and_unpacked_once(between, tmp_path):
    """ONNX Runtime 1.32 drops the factor and then fails at Relu, or makes a Gemm of all three."""
    export_what_is_not_fused(tmp_path / "model.onnx", tmp_path, between)


def test_relu_is_not_fused_without_rewriting(tmp_path, monkeypatch):
    """So that the tests above test something."""
    monkeypatch.setattr(onnx_export, "make_fusible", lambda graph: None)
    export_what_is_not_fused(tmp_path / "model.onnx", tmp_path, lambda x, w: jax.nn.relu(x @ w))


def test_a_weight_of_several_products_is_unpacked_as_a_whole(tmp_path):
    """ONNX Runtime merges equal scales of up to 8 columns, after which no copy can be fused."""
    params = {"kernel": jnp.asarray(normal(WIDTH, 8))}
    state = cbp_jax.cbp("ternary").init(params)

    def model(params, x):
        return x @ params["kernel"], jnp.tanh(x) @ params["kernel"]

    with pytest.warns(UserWarning, match="packed integers of 'kernel'"):
        cbp_jax.export_onnx(model, params, state, X, tmp_path / "model.onnx")
    quantized = cbp_jax.quantize(params, state)
    assert_same_outputs(tmp_path / "model.onnx", lambda x: model(quantized, x), X)
    assert_fused(tmp_path / "model.onnx", tmp_path, count=0)


def test_optimized_weights_lie_beside_the_graph(tmp_path, monkeypatch):
    """Unpacked, they may have more than the 2 GB that a protobuf holds."""
    real, beside = onnxruntime.InferenceSession, []

    def session(model, options, **kwargs):
        made = real(model, options, **kwargs)
        if options.optimized_model_filepath:
            beside.append(
                Path(options.optimized_model_filepath).with_name("weights").stat().st_size
            )
        return made

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    export(Chain(jax.nn.relu, False, False), tmp_path / "model.onnx", "float")
    assert beside == [LAYERS * WIDTH * WIDTH * 4]
