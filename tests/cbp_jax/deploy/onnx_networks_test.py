"""Networks exported to ONNX: JAX's outputs in ONNX Runtime, constrained layers as integers, the rest as it was."""

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

SMALL = [(small_conv_net, (8, 8, 1)), (small_mlp, (4, 4, 1))]


@pytest.mark.parametrize("scale_axis", [None, -1], ids=["tensor", "channel"])
@pytest.mark.parametrize(
    ("constraint", "weight_type"),
    [("binary", "int2"), ("two_bit_shift", "int4"), ("ternary", "float")],
)
@pytest.mark.parametrize(("network", "shape"), SMALL)
def test_small_networks(network, shape, constraint, weight_type, scale_axis, tmp_path, capfd):
    model, params, opt_state = fresh(network, constraint=constraint, scale_axis=scale_axis)
    path, x = tmp_path / "model.onnx", normal(3, *shape)
    assert export_onnx(model, params, opt_state, x, path, weight_type) < 1e-5
    assert_same_outputs(path, in_jax(model, params, opt_state), x)
    assert "onnxruntime" not in capfd.readouterr().err  # it warns of what it finds odd
    onnx.checker.check_model(path, full_check=True)

    # the integers of the file, and nothing else, are the levels
    integers = integers_in(path)
    if weight_type == "float":
        assert not integers
        return
    constrained = {
        name: (np.asarray(weight) / np.asarray(scale) * FACTORS[constraint])
        for name, weight, scale in zip(
            *list_constrained(model, cbp_jax.quantize(params, opt_state)),
            jax.tree.leaves(opt_state.weight_scale),
            strict=True,
        )
    }
    assert set(integers) == set(constrained)
    for name, levels in constrained.items():
        wanted = levels.transpose(3, 2, 0, 1) if levels.ndim == 4 else levels
        np.testing.assert_allclose(integers[name], wanted, rtol=0, atol=1e-5)


def list_constrained(model, params):
    pure = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(params))[0]
    leaves = {"/".join(str(key.key) for key in keys): leaf for keys, leaf in pure}
    names = [name for name in leaves if re.fullmatch(model.constrained, name)]
    return names, [leaves[name] for name in names]


def test_dense_layers_stay_packed_and_convolutions_are_unpacked_once(tmp_path):
    for (network, shape), expected in zip(SMALL, ({}, {"MatMulNBits": 3}), strict=True):
        for weight_type in ("int2", "int4"):
            for scale_axis in (None, -1):
                model, params, opt_state = fresh(network, scale_axis=scale_axis)
                export_onnx(
                    model,
                    params,
                    opt_state,
                    normal(2, *shape),
                    tmp_path / "model.onnx",
                    weight_type,
                )
                found = optimized_operators(tmp_path / "model.onnx", tmp_path)
                assert {
                    name: found.count(name) for name in ("MatMulNBits",) if name in found
                } == expected
                assert not {"DequantizeLinear", "Cast", "Mul"} & set(found)


def test_file_size(tmp_path):
    """4 and 2 bits per weight instead of 32, and a float32 scale per column."""

    def network(rngs):
        return models.SmallMLP(10, 16, 256, rngs=rngs)

    model, params, opt_state = fresh(network)
    sizes = {}
    for weight_type in ("float", "int4", "int2"):
        export_onnx(
            model, params, opt_state, normal(2, 4, 4, 1), tmp_path / "model.onnx", weight_type
        )
        sizes[weight_type] = (tmp_path / "model.onnx").stat().st_size
    weights, scales = 3 * 256 * 256, 3 * 256
    assert sizes["float"] - sizes["int4"] == pytest.approx(
        weights * (4 - 1 / 2) - 4 * scales, rel=1e-3
    )
    assert sizes["int4"] - sizes["int2"] == pytest.approx(weights * (1 / 2 - 1 / 4), rel=1e-3)


IMAGENET = ["alexnet", "resnet18", "resnet50", "googlenet"]


def check_imagenet_network(name, size, tmp_path, options):
    model, params, opt_state = fresh(lambda rngs: models.create(name, 10, rngs=rngs), **options)
    path, x = tmp_path / "model.onnx", normal(2, size, size, 3)
    assert export_onnx(model, params, opt_state, x, path, "int4") < 1e-5
    assert_same_outputs(path, in_jax(model, params, opt_state), x)
    names, weights = list_constrained(model, params)
    integers = integers_in(path)
    assert {name: array.size for name, array in integers.items()} == {
        name: weight.size for name, weight in zip(names, weights, strict=True)
    }


def test_imagenet_network_per_channel(tmp_path):
    """The others take half a minute each."""
    check_imagenet_network(
        "resnet18", 32, tmp_path, {"constraint": "one_bit_shift", "scale_axis": -1}
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_networks_at_224_pixels(name, tmp_path):
    check_imagenet_network(name, 224, tmp_path, {"constraint": "ternary"})
