"""Weight files as safetensors, without torch; torch_parity_test.py compares outputs."""

import sys

import jax
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("flax", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")

import safetensors.numpy
from common import models
from common.models import torch_weights
from flax import nnx


def abstract(name, **options):
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))


def filled(model, value):
    """A network's parameters and statistics, all of one value."""
    trees = models.split_model(model)[1:]
    return jax.tree.map(lambda leaf: np.full(leaf.shape, value, leaf.dtype), trees)


@pytest.fixture(scope="module")
def resnet20():
    return abstract("resnet20")


@pytest.fixture
def state_dict():
    """The names and shapes of PyTorch's ResNet-20, written out."""
    generator = np.random.default_rng(0)
    arrays = {}

    def add(name, *shape):
        arrays[name] = generator.normal(size=shape).astype(np.float32)

    def add_norm(name, features):
        for kind in ("weight", "bias", "running_mean", "running_var"):
            add(f"{name}.{kind}", features)

    add("conv1.weight", 16, 3, 3, 3)
    add_norm("bn1", 16)
    for layer, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            features_in = width // 2 if layer > 1 and block == 0 else width
            add(f"layer{layer}.{block}.conv1.weight", width, features_in, 3, 3)
            add_norm(f"layer{layer}.{block}.bn1", width)
            add(f"layer{layer}.{block}.conv2.weight", width, width, 3, 3)
            add_norm(f"layer{layer}.{block}.bn2", width)
    add("fc.weight", 10, 64)
    add("fc.bias", 10)
    return arrays


@pytest.fixture
def load(tmp_path):
    """A function that saves a state dict and loads it for a model."""

    def load(arrays, model):
        safetensors.numpy.save_file(arrays, tmp_path / "weights.safetensors")
        return torch_weights.load_torch(tmp_path / "weights.safetensors", model)

    return load


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_places_every_array(resnet20, state_dict, load):
    params, batch_stats = load(state_dict, resnet20)
    kernel = state_dict["layer2.0.conv1.weight"]
    loaded = params["layer2"][0]["conv1"]["kernel"]
    assert loaded.shape == (3, 3, 16, 32)
    for o, i, h, w in ((0, 0, 0, 0), (31, 2, 1, 0), (5, 15, 0, 2)):
        assert loaded[h, w, i, o] == kernel[o, i, h, w]
    np.testing.assert_array_equal(params["fc"]["kernel"], state_dict["fc.weight"].T)
    np.testing.assert_array_equal(params["fc"]["bias"], state_dict["fc.bias"])
    np.testing.assert_array_equal(
        params["layer3"][2]["bn2"]["scale"], state_dict["layer3.2.bn2.weight"]
    )
    np.testing.assert_array_equal(
        params["layer3"][2]["bn2"]["bias"], state_dict["layer3.2.bn2.bias"]
    )
    np.testing.assert_array_equal(batch_stats["bn1"]["mean"], state_dict["bn1.running_mean"])
    np.testing.assert_array_equal(batch_stats["bn1"]["var"], state_dict["bn1.running_var"])


def test_loaded_weights_fit_the_network(resnet20, state_dict, load):
    """Names, shapes and dtypes are those of `split_model`, and all of it runs."""
    graphdef, *trees = models.split_model(resnet20)
    loaded = load(state_dict, resnet20)
    ours, theirs = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (tuple(trees), loaded)
    )
    assert ours == theirs
    # Flax would write into numpy's.
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
    model = nnx.merge(graphdef, *loaded)
    model.eval()
    assert jax.eval_shape(
        lambda images: model(images), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    ).shape == (1, 10)


def test_round_trip(resnet20, state_dict, load):
    back = torch_weights.to_torch(resnet20, *load(state_dict, resnet20))
    assert back.keys() == state_dict.keys()
    # As safetensors and torch need them.
    assert all(value.flags.c_contiguous and value.flags.writeable for value in back.values())
    for name, value in state_dict.items():
        np.testing.assert_array_equal(back[name], value)
    assert_same(load(back, resnet20), load(state_dict, resnet20))  # through a file, too


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layer2/0/downsample/1/var", "layer2.0.downsample.1.running_var"),
        ("layer1/0/conv1/kernel", "layer1.0.conv1.weight"),
        ("inception3a/branch4/1/bn/scale", "inception3a.branch4.1.bn.weight"),
        ("features/4/kernel", "features.4.weight"),
        ("classifier/6/bias", "classifier.6.bias"),
        ("bn1/mean", "bn1.running_mean"),
    ],
)
def test_torch_name(ours, theirs):
    assert torch_weights.torch_name(ours) == theirs


def test_flattened_images(load):
    """PyTorch flattens an image with channels first, we with channels last."""
    model = abstract("googlenet", num_classes=2)
    zeros = torch_weights.to_torch(model, *filled(model, 0))
    image = np.random.default_rng(0).normal(size=(4, 4, 128))
    for head in ("aux1", "aux2"):
        weight = np.random.default_rng(1).normal(size=(1024, 2048)).astype(np.float32)
        params, stats = load(zeros | {f"{head}.fc1.weight": weight}, model)
        kernel = np.asarray(params[head]["fc1"]["kernel"], np.float64)
        np.testing.assert_allclose(
            image.ravel() @ kernel, weight @ image.transpose(2, 0, 1).ravel(), atol=1e-9
        )
        np.testing.assert_array_equal(
            torch_weights.to_torch(model, params, stats)[f"{head}.fc1.weight"], weight
        )


def test_strips_distributed_prefix(resnet20, state_dict, load):
    assert_same(
        load({f"module.{name}": value for name, value in state_dict.items()}, resnet20),
        load(state_dict, resnet20),
    )


def test_others_call_the_last_layer_linear(resnet20, state_dict, load):
    expected = load(state_dict, resnet20)
    others = {f"module.{name.replace('fc.', 'linear.')}": v for name, v in state_dict.items()}
    assert "module.linear.weight" in others
    assert_same(load(others, resnet20), expected)
    both = state_dict | {"linear.bias": state_dict["fc.bias"]}
    with pytest.raises(ValueError, match=r"unexpected: linear\.bias, shape \(10,\)"):
        load(both, resnet20)


def test_ignores_counters_and_scales(resnet20, state_dict, load):
    more = {"bn1.num_batches_tracked": np.array(7), "layer1.0.conv1.scale": np.ones(1, np.float32)}
    assert_same(load(state_dict | more, resnet20), load(state_dict, resnet20))


def test_drops_auxiliary_heads_for_networks_without_them(load):
    with_heads, without = abstract("googlenet"), abstract("googlenet", auxiliary_heads=False)
    arrays = torch_weights.to_torch(with_heads, *filled(with_heads, 1))
    params, _ = load(arrays, without)
    assert jax.tree.structure(params) == jax.tree.structure(models.split_model(without)[1])
    headless = {name: value for name, value in arrays.items() if not name.startswith("aux")}
    with pytest.raises(ValueError, match=r"GoogLeNet:(\n  missing: aux[12]\.\S+, shape .*){18}$"):
        load(headless, with_heads)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_floats(resnet20, state_dict, load, dtype):
    cast = {name: value.astype(dtype) for name, value in state_dict.items()}
    assert_same(
        load(cast, resnet20),
        load({name: value.astype(np.float32) for name, value in cast.items()}, resnet20),
    )


def test_lists_every_mismatch(resnet20, state_dict, load):
    del state_dict["layer1.0.conv1.weight"], state_dict["bn1.running_var"]
    state_dict["fc.weight"] = np.ones((1000, 64), np.float32)
    state_dict["head.weight"] = np.ones((2, 3), np.float32)
    state_dict["conv2.scale"] = np.ones(1, np.float32)  # beside no weight
    state_dict["layer1.1.conv1.weight"] = np.ones((16, 16, 3, 3), np.int8)
    state_dict["layer3.0.bn1.bias"][:3] = np.nan, np.inf, -np.inf
    with pytest.raises(
        ValueError, match=r"weights\.safetensors does not fit this ResNet:\n"
    ) as error:
        load(state_dict, resnet20)
    assert sorted(line.strip() for line in str(error.value).splitlines()[1:]) == [
        "missing: bn1.running_var, shape (16,)",
        "missing: layer1.0.conv1.weight, shape (16, 16, 3, 3)",
        "not finite: layer3.0.bn1.bias, 3 of 64 values",
        "other dtype: layer1.1.conv1.weight, found I8, expected one of float32, float64, float16, "
        "bfloat16",
        "other shape: fc.weight, found (1000, 64), expected (10, 64)",
        "unexpected: conv2.scale, shape (1,)",
        "unexpected: head.weight, shape (2, 3)",
    ]


def test_rejects_another_network(resnet20, state_dict, load):
    """Every weight of the file is unexpected, every one of the network missing."""
    with pytest.raises(ValueError, match="AlexNet") as error:
        load(state_dict, abstract("alexnet"))
    alexnet = sum(
        len(jax.tree.leaves(tree)) for tree in models.split_model(abstract("alexnet"))[1:]
    )
    assert len(str(error.value).splitlines()) == 1 + len(state_dict) + alexnet


def test_missing_file(resnet20, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"resnet\.pth: download"):
        torch_weights.load_torch(tmp_path / "resnet.pth", resnet20)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1000],
        lambda content: b"<!DOCTYPE html><html></html>",
    ],
)
def test_damaged_file(resnet20, state_dict, tmp_path, damage):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(damage(safetensors.numpy.save(state_dict)))
    with pytest.raises(
        ValueError, match=r"weights\.safetensors is not a safetensors file, or is damaged"
    ):
        torch_weights.load_torch(path, resnet20)


@pytest.mark.parametrize(
    ("name", "module"), [("weights.pth", "torch"), ("weights.safetensors", "safetensors")]
)
def test_missing_package(resnet20, tmp_path, monkeypatch, name, module):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ImportError, match=f"reading {name} needs {package}: pip install {package}"):
        torch_weights.load_torch(tmp_path / name, resnet20)
