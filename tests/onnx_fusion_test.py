"""Products by packed integers stay packed whatever follows them: ONNX Runtime's optimized graph has a MatMulNBits for each."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from onnx_support import assert_same_outputs, normal, onnx, optimized_operators

import cbp_jax
from cbp_jax import onnx_export

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
    def __init__(self, activation, bias, norm):
        rngs = nnx.Rngs(0)
        init = nnx.initializers.normal()
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, use_bias=bias, bias_init=init, rngs=rngs) for _ in range(LAYERS)])
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, bias_init=init, rngs=rngs) for _ in range(LAYERS)]) if norm else None
        self.activation = activation

    def __call__(self, x):
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if self.norms is not None:
                x = self.norms[i](x)
            x = self.activation(x)
        return x


def export_chain(path, activation, bias, norm, weight_type, scale_axis):
    model = Chain(activation, bias, norm)
    params = nnx.state(model, nnx.Param)
    state = cbp_jax.cbp("ternary", scale_axis=scale_axis).init(params)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime does not fuse")
        cbp_jax.export_onnx(model, params, state, X, path, weight_type)
    quantized = cbp_jax.quantize(model, state)
    quantized.eval()
    assert_same_outputs(path, nnx.jit(lambda x: quantized(x)), X)


def assert_fused(path, tmp_path, count=LAYERS):
    operators = optimized_operators(path, tmp_path)
    assert operators.count("MatMulNBits") == count, operators
    assert "DequantizeLinear" not in operators


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_chains(activation, bias, tmp_path):
    path = tmp_path / "model.onnx"
    export_chain(path, ACTIVATIONS[activation], bias, norm=False, weight_type="int4", scale_axis=None)
    assert_fused(path, tmp_path)


@pytest.mark.parametrize("weight_type", ["int4", "int2"])
@pytest.mark.parametrize("scale_axis", [None, -1])
@pytest.mark.parametrize("norm", [False, True], ids=["bias", "batch norm"])
def test_relu_with_each_type_and_scale(weight_type, scale_axis, norm, tmp_path):
    path = tmp_path / "model.onnx"
    export_chain(path, jax.nn.relu, True, norm, weight_type, scale_axis)
    assert_fused(path, tmp_path)


def test_functions(tmp_path):
    """Biases that are added by hand, a residual, and a matrix that two products share."""
    params = {
        name: {"kernel": jnp.asarray(normal(WIDTH, WIDTH + i)[:, :WIDTH]), "bias": jnp.ones(WIDTH)} for i, name in enumerate("ab")
    }
    state = cbp_jax.cbp("binary").init(params)

    def model(params, x):
        y = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        y = y @ params["b"]["kernel"] + x
        return jax.nn.relu(y @ params["a"]["kernel"] + x[:1].sum())

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime does not fuse")
        cbp_jax.export_onnx(model, params, state, X, tmp_path / "model.onnx")
    assert_fused(tmp_path / "model.onnx", tmp_path)


def test_a_product_in_a_loop_is_unpacked_once(tmp_path):
    """Nothing is fused across a loop's border, so the weight is made where loading folds it."""
    params = {"kernel": jnp.asarray(normal(WIDTH, WIDTH))}
    state = cbp_jax.cbp("binary").init(params)

    def model(params, x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ params["kernel"]), None), x, None, length=3)[0]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "ONNX Runtime does not fuse")
        cbp_jax.export_onnx(model, params, state, X, tmp_path / "model.onnx")
    assert "DequantizeLinear" not in optimized_operators(tmp_path / "model.onnx", tmp_path)


def test_what_is_not_fused_is_named(tmp_path, monkeypatch):
    """Without the rewriting, a Relu behind a product is enough."""
    monkeypatch.setattr(onnx_export, "make_fusible", lambda graph: None)
    params = {"first": {"kernel": jnp.asarray(normal(WIDTH, WIDTH))}, "second": {"kernel": jnp.asarray(normal(WIDTH, 8))}}
    state = cbp_jax.cbp("ternary").init(params)

    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(WIDTH, 8, use_bias=False, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.second(jax.nn.relu(self.first(x)))

    path = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match=r"does not fuse the products by 'first/kernel': it unpacks these weights at every call"):
        cbp_jax.export_onnx(Model(), params, state, X, path)
    assert "Relu" in [node.op_type for node in onnx.load(path).graph.node]
