"""The two ways to run a network from packed weights: equal results, different memory."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from trees import KINDS, X, network

import cbp_jax

LAYERS, WIDTH = 6, 256


def stack(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"layer{i}"])
    return x


@pytest.fixture(scope="module")
def packed():
    rng = np.random.default_rng(0)
    params = {
        f"layer{i}": jnp.asarray(rng.normal(size=(WIDTH, WIDTH)), jnp.float32) / 16
        for i in range(LAYERS)
    }
    return cbp_jax.pack(params, cbp_jax.cbp("ternary").init(params), round=True)


def memory(predict, *inputs):
    """Bytes of the arguments, and of what the compiled function needs besides."""
    analysis = predict.func.lower(*predict.args, *inputs).compile().memory_analysis()
    return analysis.argument_size_in_bytes, analysis.temp_size_in_bytes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["expand", "packed"])
def test_is_the_forward_pass_of_quantized_weights(kind, weights):
    params, forward = network(kind)
    state = cbp_jax.cbp("two_bit_shift", scale_axis=-1).init(params)
    packed = cbp_jax.pack(params, state, round=True)
    predict = cbp_jax.make_predict(forward, packed, params, weights=weights)
    expected = jax.jit(forward)(cbp_jax.quantize(params, state), X)
    np.testing.assert_allclose(predict(X), expected, rtol=1e-6, atol=1e-6)


def test_packed_weights_stay_packed(packed):
    x = jnp.ones((2, WIDTH))
    layer = 4 * WIDTH * WIDTH
    arguments, temporary = memory(cbp_jax.make_predict(stack, packed), x)
    assert arguments >= LAYERS * layer
    assert temporary < layer
    arguments, temporary = memory(cbp_jax.make_predict(stack, packed, weights="packed"), x)
    assert arguments < LAYERS * layer / 15
    assert temporary < 2 * layer  # of one layer, not of all


def test_scan_unpacks_a_layer_at_a_time():
    """On stacked layers, without any flag."""
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, WIDTH, WIDTH)), jnp.float32)
    layers = [{"kernel": kernel} for kernel in kernels]
    link = cbp_jax.cbp("binary")
    codes = [cbp_jax.pack(layer, link.init(layer), round=True) for layer in layers]
    stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *codes)

    @jax.jit
    def predict(stacked, x):
        def run_layer(x, layer):
            return jnp.tanh(x @ cbp_jax.unpack(layer)["kernel"]), None

        return jax.lax.scan(run_layer, x, stacked)[0]

    x = jnp.ones((2, WIDTH)) / 16
    expected = x
    for kernel in kernels:
        expected = jnp.tanh(expected @ (jnp.where(kernel >= 0, 1, -1) * jnp.mean(jnp.abs(kernel))))
    np.testing.assert_allclose(predict(stacked, x), expected, rtol=1e-5, atol=1e-5)
    analysis = predict.lower(stacked, x).compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 2 * 4 * WIDTH * WIDTH


def test_dtype(packed):
    half = cbp_jax.make_predict(stack, packed, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.args[0])} == {jnp.dtype(jnp.bfloat16)}
    dtypes, options = [], {"weights": "packed", "dtype": jnp.bfloat16}
    cbp_jax.make_predict(lambda p, x: dtypes.append(p["layer0"].dtype), packed, **options)(1)
    assert dtypes == [jnp.bfloat16]


def test_mistakes(packed):
    with pytest.raises(ValueError, match="'unpacked' is neither 'expand' nor 'packed'"):
        cbp_jax.make_predict(stack, packed, weights="unpacked")
    for weights in ("expand", "packed"):
        with pytest.raises(cbp_jax.PackedError, match="no 'other'"):
            cbp_jax.make_predict(stack, packed, {"other": jnp.ones(3)}, weights=weights)


CALL = """
import sys
import cbp_jax, jax, numpy as np
from jax import export
function = export.deserialize(open(sys.argv[1], "rb").read())
x = np.load(sys.argv[3])
np.save(sys.argv[4], function.call(cbp_jax.load_packed(sys.argv[2]), x))
"""


def test_exported_for_every_platform(packed, tmp_path):
    """The function in one file and the weights in another, called in a new process."""
    x = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)
    predict = cbp_jax.make_predict(stack, packed, weights="packed")
    exported = export.export(predict.func, platforms=("cpu", "cuda", "tpu"))(*predict.args, x)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    content = exported.serialize()
    assert len(content) < packed.nbytes / 4
    (tmp_path / "function").write_bytes(content)
    cbp_jax.save_packed(tmp_path / "weights", packed)
    np.save(tmp_path / "x.npy", x)
    names = [str(tmp_path / name) for name in ("function", "weights", "x.npy", "y.npy")]
    subprocess.run([sys.executable, "-c", CALL, *names], check=True, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), predict(x), rtol=1e-6, atol=1e-6)


def test_exported_for_any_batch(packed):
    predict = cbp_jax.make_predict(stack, packed, weights="packed")
    x = jax.ShapeDtypeStruct((*export.symbolic_shape("batch"), WIDTH), jnp.float32)
    exported = export.deserialize(export.export(predict.func)(*predict.args, x).serialize())
    for batch in (1, 5):
        x = jnp.ones((batch, WIDTH))
        np.testing.assert_allclose(exported.call(packed, x), predict(x), rtol=1e-6, atol=1e-6)
