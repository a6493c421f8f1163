"""Exported networks: JAX's outputs in ONNX Runtime, constrained layers as integers, no others."""

import importlib.metadata
import re

import jax
import numpy as np
import pytest
from common import models
from flax import nnx
from onnx_support import (
    FACTORS,
    assert_same_outputs,
    fresh,
    in_jax,
    integers_in,
    normal,
    onnx,
    optimized_operators,
    small_conv_net,
    small_mlp,
)

import cbp_jax
from cbp_jax.deploy.onnx_export import export_onnx

SHAPES = {small_conv_net: (8, 8, 1), small_mlp: (4, 4, 1)}


# Every type with a scale per tensor and per channel, on one network or the other.
SMALL_CASES = [
    (small_conv_net, "binary", "int2", None),
    (small_conv_net, "two_bit_shift", "int4", -1),
    (small_conv_net, "ternary", "float", None),
    (small_mlp, "binary", "int2", -1),
    (small_mlp, "two_bit_shift", "int4", None),
    (small_mlp, "ternary", "float", -1),
]


@pytest.mark.parametrize(("network", "constraint", "weight_type", "scale_axis"), SMALL_CASES)
def test_small_networks(network, constraint, weight_type, scale_axis, tmp_path, capfd):
    model, params, opt_state = fresh(network, constraint=constraint, scale_axis=scale_axis)
    path, x = tmp_path / "model.onnx", normal(3, *SHAPES[network])
    assert export_onnx(model, params, opt_state, x, path, weight_type) < 1e-5
    assert_same_outputs(path, in_jax(model, params, opt_state), x)
    assert "onnxruntime" not in capfd.readouterr().err  # where it warns of oddities
    onnx.checker.check_model(path, full_check=True)

    # The integers of the file, and nothing else, are the levels.
    integers = integers_in(path)
    if weight_type == "float":
        assert not integers
        return
    names, weights = list_constrained(model, cbp_jax.quantize(params, opt_state))
    scales = jax.tree.leaves(opt_state.weight_scale)
    assert set(integers) == set(names)
    for name, weight, scale in zip(names, weights, scales, strict=True):
        levels = np.asarray(weight) / np.asarray(scale) * FACTORS[constraint]
        wanted = levels.transpose(3, 2, 0, 1) if levels.ndim == 4 else levels
        np.testing.assert_allclose(integers[name], wanted, rtol=0, atol=1e-5)


def list_constrained(model, params):
    pure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))[0]
    leaves = {"/".join(str(key.key) for key in keys): leaf for keys, leaf in pure}
    names = [name for name in leaves if re.fullmatch(model.constrained, name)]
    return names, [leaves[name] for name in names]


@pytest.mark.parametrize(("network", "products"), [(small_conv_net, 0), (small_mlp, 3)])
def test_dense_layers_stay_packed_and_convolutions_are_unpacked_once(network, products, tmp_path):
    for weight_type in ("int2", "int4"):
        for scale_axis in (None, -1):
            model, params, opt_state = fresh(network, scale_axis=scale_axis)
            path, x = tmp_path / "model.onnx", normal(2, *SHAPES[network])
            export_onnx(model, params, opt_state, x, path, weight_type)
            found = optimized_operators(path, tmp_path)
            assert found.count("MatMulNBits") == products
            assert not {"DequantizeLinear", "Cast", "Mul"} & set(found)


def test_file_size(tmp_path):
    """4 and 2 bits per weight instead of 32, and a float32 scale per column."""

    def network(rngs):
        return models.SmallMLP(10, 16, 256, rngs=rngs)

    model, params, opt_state = fresh(network)
    path, sizes = tmp_path / "model.onnx", {}
    for weight_type in ("float", "int4", "int2"):
        export_onnx(model, params, opt_state, normal(2, 4, 4, 1), path, weight_type)
        sizes[weight_type] = path.stat().st_size
    weights, scales = 3 * 256 * 256, 3 * 256
    saved = weights * (4 - 1 / 2) - 4 * scales
    assert sizes["float"] - sizes["int4"] == pytest.approx(saved, rel=1e-3)
    assert sizes["int4"] - sizes["int2"] == pytest.approx(weights * (1 / 2 - 1 / 4), rel=1e-3)


IMAGENET = ["alexnet", "resnet18", "resnet50", "googlenet"]


def check_imagenet_network(name, size, tmp_path, options):
    model, params, opt_state = fresh(lambda rngs: models.create(name, 10, rngs=rngs), **options)
    path, x = tmp_path / "model.onnx", normal(2, size, size, 3)
    assert export_onnx(model, params, opt_state, x, path, "int4") < 1e-5
    assert_same_outputs(path, in_jax(model, params, opt_state), x)
    wanted = {n: weight.size for n, weight in zip(*list_constrained(model, params), strict=True)}
    assert {n: array.size for n, array in integers_in(path).items()} == wanted


@pytest.mark.skipif(
    importlib.metadata.version("jax2onnx") == "0.13.0", reason="it converts named padding alone"
)
def test_imagenet_network_with_a_scale_per_channel(tmp_path):
    """The others take half a minute each."""
    options = {"constraint": "one_bit_shift", "scale_axis": -1}
    check_imagenet_network("resnet18", 32, tmp_path, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_at_224_pixels(name, tmp_path):
    check_imagenet_network(name, 224, tmp_path, {"constraint": "ternary"})
