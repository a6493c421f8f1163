"""Networks to export to ONNX, and ONNX Runtime to run the files with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import models
from flax import nnx

import cbp_jax

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

# What makes the levels integers.
FACTORS = {"binary": 1, "ternary": 1, "one_bit_shift": 2, "two_bit_shift": 4}
INT4, INT2 = onnx.TensorProto.INT4, onnx.TensorProto.INT2


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def session(path, optimized=None):
    """ONNX Runtime at its most exact; writes the optimized graph to a file if one is named."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def optimized_operators(path, tmp_path):
    session(path, tmp_path / "optimized.onnx")
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def assert_same_outputs(path, function, *inputs):
    """Compares at the batch size of the inputs, at 1 and at 5."""
    running = session(path)
    names = [value.name for value in running.get_inputs()]
    assert names == (["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))])
    for size in (len(inputs[0]), 1, 5):
        batch = [np.resize(x, (size, *x.shape[1:])) for x in inputs]
        wanted = jax.tree.leaves(function(*batch))
        got = running.run(None, dict(zip(names, batch, strict=True)))
        for a, b in zip(got, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.max(np.abs(b)))


def integers_in(path):
    graph = onnx.load(path).graph
    types = {INT4, INT2}
    return {
        tensor.name: onnx.numpy_helper.to_array(tensor).astype(int)
        for tensor in graph.initializer
        if tensor.data_type in types
    }


def fresh(network, **options):
    """A network with random weights and statistics, its parameters, and a state of `cbp`."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        values = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            return jnp.asarray(values * np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.dtype)
        centre = 1 if path[-2].key in ("scale", "var") else 0
        return jnp.asarray(centre + 0.3 * np.tanh(values), leaf.dtype)

    model = nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))
    nnx.update(model, jax.tree_util.tree_map_with_path(fill, nnx.state(model)))
    params = nnx.state(model, nnx.Param)
    options = {
        "constraint": "ternary",
        "mask": cbp_jax.select(include=model.constrained),
        **options,
    }
    return model, params, cbp_jax.cbp(**options).init(params)


def in_jax(model, params, opt_state):
    """The network's outputs at its quantized weights, in evaluation mode."""
    model = nnx.clone(model)
    nnx.update(model, cbp_jax.quantize(params, opt_state))
    model.eval()
    # The weights are an argument, as constants take long to compile; one example at a time, which
    # compiles once for all sizes of a batch.
    run = nnx.jit(lambda model, x: model(x))
    return lambda x: np.concatenate([run(model, x[i : i + 1]) for i in range(len(x))])


def small_conv_net(rngs):
    return models.SmallConvNet(10, 6, rngs=rngs)


def small_mlp(rngs):
    return models.SmallMLP(10, 16, 32, rngs=rngs)
