"""Running exported files, and networks to export."""

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

# What a level is to be multiplied by to be an integer.
FACTORS = {"binary": 1, "ternary": 1, "one_bit_shift": 2, "two_bit_shift": 4}
INT4, INT2 = onnx.TensorProto.INT4, onnx.TensorProto.INT2


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def session(path, optimized=None):
    """ONNX Runtime as it computes most exactly; writes the optimized graph to a file, if one is named."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def optimized_operators(path, tmp_path):
    session(path, tmp_path / "optimized.onnx")
    return [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]


def assert_same_outputs(path, function, *inputs):
    """At the batch size of the inputs, at 1 and at 5."""
    running = session(path)
    names = [value.name for value in running.get_inputs()]
    assert names == (["input"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))])
    for batch in (
        inputs,
        [x[:1] for x in inputs],
        [np.resize(x, (5, *x.shape[1:])) for x in inputs],
    ):
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
    """A network with statistics that are not those of a new one, and its parameters and state."""
    model = network(rngs=nnx.Rngs(0))
    stats = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(lambda s: jnp.asarray(0.5 + np.abs(normal(*s.shape))), stats))
    params = nnx.state(model, nnx.Param)
    optimizer = cbp_jax.cbp(
        **{"constraint": "ternary", "mask": cbp_jax.select(include=model.constrained), **options}
    )
    return model, params, optimizer.init(params)


def in_jax(model, params, opt_state):
    """The network's outputs at its quantized weights, in evaluation mode."""
    model = nnx.clone(model)
    nnx.update(model, cbp_jax.quantize(params, opt_state))
    model.eval()
    return nnx.jit(lambda x: model(x))


def small_conv_net(rngs):
    return models.SmallConvNet(10, 6, rngs=rngs)


def small_mlp(rngs):
    return models.SmallMLP(10, 16, 32, rngs=rngs)
