"""The networks: their parameters, which are constrained, and their outputs; mostly by shapes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax", reason='needs the extra: pip install -e ".[test]"')

from common import models
from common.models import googlenet, layers
from common.models.resnet import BasicBlock
from flax import nnx

import cbp_jax

SIZE = {
    "resnet20": 32,
    "cifar_resnet18": 32,
    "alexnet": 224,
    "resnet18": 224,
    "resnet50": 224,
    "googlenet": 224,
    "small_conv": 8,
    "small_mlp": 28,
}
CLASSES = {name: 1000 if size == 224 else 10 for name, size in SIZE.items()}
CHANNELS = {name: 1 if name.startswith("small") else 3 for name in SIZE}
NAMES = sorted(SIZE)


@functools.cache
def abstract(name, **options):
    """A network of shapes, shared by the tests in whatever mode it is."""
    return nnx.eval_shape(lambda: models.create(name, rngs=nnx.Rngs(0), **options))


def weights(model):
    """Draws a network's parameters and statistics by numpy, faster than compiled initialisers."""
    generator = np.random.default_rng(0)

    def fill(keys, leaf):
        if leaf.ndim > 1:
            return generator.normal(
                scale=np.sqrt(2 / np.prod(leaf.shape[:-1])), size=leaf.shape
            ).astype(np.float32)
        return np.full(leaf.shape, keys[-1].key in ("scale", "var"), np.float32)

    return jax.tree.map_with_path(fill, models.split_model(model)[1:])


def forward(model, training, seed=0):
    """Returns a function (params, batch_stats, images) -> (output, new batch_stats)."""
    graphdef, _, _ = models.split_model(model)

    def apply(params, batch_stats, images):
        model = nnx.merge(graphdef, params, batch_stats)
        (model.train if training else model.eval)()
        output = model(images, rngs=nnx.Rngs(seed) if training else None)
        return output, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return apply


def output_shape(model, training, size, batch=2, channels=3):
    images = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.float32)
    return jax.eval_shape(forward(model, training), *models.split_model(model)[1:], images)[0]


def paths(tree):
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree.leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("alexnet", {}, 61_110_184),
        ("resnet18", {}, 11_689_512),
        ("resnet50", {}, 25_557_032),
        ("googlenet", {"auxiliary_heads": False}, 6_624_904),
        ("googlenet", {}, 13_004_888),
        ("resnet20", {}, 269_722),
        ("cifar_resnet18", {}, 11_173_962),
        ("cifar_resnet18", {"num_classes": 100}, 11_173_962 + 90 * 513),
        ("small_conv", {}, 9 * (6 + 6 * 12 + 12 * 12) + 2 * (6 + 12 + 12) + 13 * 10),
        ("small_mlp", {}, 64 * (784 + 3 * 64) + 4 * 2 * 64 + 65 * 10),
        ("small_mlp", {"features_in": 9, "width": 8}, 8 * (9 + 3 * 8) + 4 * 2 * 8 + 9 * 10),
    ],
)
def test_parameter_count(name, options, count):
    params = models.split_model(abstract(name, **options))[1]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


AUXILIARY = {
    f"{head}/{layer}/kernel"
    for head, layer in itertools.product(("aux1", "aux2"), ("conv/conv", "fc1", "fc2"))
}


@pytest.mark.parametrize(
    ("name", "options", "count", "first_and_last"),
    [
        ("alexnet", {}, 6, {"features/0/kernel", "classifier/6/kernel"}),
        ("resnet18", {}, 19, {"conv1/kernel", "fc/kernel"}),
        ("resnet50", {}, 52, {"conv1/kernel", "fc/kernel"}),
        ("googlenet", {"auxiliary_heads": False}, 56, {"conv1/conv/kernel", "fc/kernel"}),
        ("googlenet", {}, 56, {"conv1/conv/kernel", "fc/kernel"} | AUXILIARY),
        ("resnet20", {}, 18, {"conv1/kernel", "fc/kernel"}),
        ("cifar_resnet18", {}, 19, {"conv1/kernel", "fc/kernel"}),
        ("small_conv", {}, 2, {"conv1/kernel", "head/kernel"}),
        ("small_mlp", {}, 3, {"hidden0/kernel", "head/kernel"}),
    ],
)
def test_constrained(name, options, count, first_and_last):
    """All kernels (leaves of two or four axes) but the first and the last, and nothing else."""
    model = abstract(name, **options)
    params = models.split_model(model)[1]
    chosen = {
        path
        for path, yes in paths(cbp_jax.select(include=model.constrained)(params)).items()
        if yes
    }
    kernels = {path for path, leaf in paths(params).items() if leaf.ndim >= 2}
    assert chosen == kernels - first_and_last
    assert first_and_last <= kernels
    assert len(chosen) == count


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_output(name, training):
    model = abstract(name, dtype=jnp.bfloat16)
    output = output_shape(model, training, SIZE[name], channels=CHANNELS[name])
    logits = output if isinstance(output, tuple) else (output,)
    assert len(logits) == (3 if name == "googlenet" and training else 1)
    assert [(leaf.shape, leaf.dtype) for leaf in logits] == [
        ((2, CLASSES[name]), jnp.float32)
    ] * len(logits)


def test_googlenet_without_heads_returns_logits_alone():
    assert output_shape(abstract("googlenet", auxiliary_heads=False), True, 224).shape == (2, 1000)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "googlenet", "resnet20"])
def test_other_image_sizes(name):
    assert output_shape(abstract(name), False, 97, batch=1).shape == (1, CLASSES[name])


@pytest.mark.parametrize("name", NAMES)
def test_dtypes(name):
    """Products but the heads' are in bfloat16; parameters and updated statistics in float32."""
    model = abstract(name, dtype=jnp.bfloat16)
    trees = models.split_model(model)[1:]
    images = jax.ShapeDtypeStruct((2, SIZE[name], SIZE[name], CHANNELS[name]), jnp.float32)
    jaxpr, (_, batch_stats) = jax.make_jaxpr(forward(model, True), return_shape=True)(
        *trees, images
    )
    assert {leaf.dtype for leaf in jax.tree.leaves((*trees, batch_stats))} == {jnp.dtype("float32")}
    assert jax.tree.structure(batch_stats) == jax.tree.structure(trees[1])
    products = ("conv_general_dilated", "dot_general")
    dtypes = [
        {variable.aval.dtype for variable in (*eqn.invars, *eqn.outvars)}
        for eqn in jaxpr.eqns
        if eqn.primitive.name in products
    ]
    heads = 3 if name == "googlenet" else 1
    assert dtypes.count({jnp.dtype("float32")}) == heads
    assert dtypes.count({jnp.dtype("bfloat16")}) == len(dtypes) - heads
    assert len(dtypes) == sum(leaf.ndim >= 2 for leaf in jax.tree.leaves(trees[0]))


@pytest.mark.parametrize("name", NAMES)
def test_modes(name):
    model = abstract(name)
    modules = [m for _, m in nnx.iter_modules(model) if isinstance(m, nnx.BatchNorm | nnx.Dropout)]
    stats = models.split_model(model)[2]
    assert sum(isinstance(m, nnx.BatchNorm) for m in modules) == len(jax.tree.leaves(stats)) / 2
    for switch, evaluating in ((model.eval, True), (model.train, False)):
        switch()
        assert all(
            (m.use_running_average if isinstance(m, nnx.BatchNorm) else m.deterministic)
            == evaluating
            for m in modules
        )


def test_unknown_network():
    with pytest.raises(
        ValueError, match=r"'vgg'.*alexnet, resnet18, resnet50, googlenet, resnet20, cifar_resnet18"
    ):
        models.create("vgg", rngs=nnx.Rngs(0))


def test_initialisation():
    """He et al. 2015 by fan-out: variance 2 / (9 * channels out)."""
    kernel = np.asarray(layers.conv(32, 64, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)).kernel[...])
    assert kernel.shape == (3, 3, 32, 64)
    np.testing.assert_allclose(kernel.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    assert abs(kernel.mean()) < 0.001


def test_batch_statistics():
    """Training adds a tenth of the batch's statistics, here written out; evaluation nothing."""
    resnet20 = abstract("resnet20")
    params, stats = weights(resnet20)
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    _, trained = jax.jit(forward(resnet20, True))(params, stats, images)
    _, evaluated = jax.jit(forward(resnet20, False))(params, stats, images)
    jax.tree.map(np.testing.assert_array_equal, evaluated, stats)

    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), axis=(1, 2)
    )
    x = np.einsum("nijchw,hwco->nijo", windows, params["conv1"]["kernel"])
    np.testing.assert_allclose(
        trained["bn1"]["mean"], 0.1 * x.mean((0, 1, 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(trained["bn1"]["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-4)


def test_evaluation_treats_each_image_alone():
    resnet20 = abstract("resnet20")
    params, stats = weights(resnet20)
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype(np.float32)
    evaluate, step = jax.jit(forward(resnet20, False)), jax.jit(forward(resnet20, True))
    changed = np.concatenate([images[:1], 3 * images[1:]])
    logits, others = evaluate(params, stats, images)[0], evaluate(params, stats, changed)[0]
    np.testing.assert_allclose(logits[0], others[0], rtol=1e-5)
    in_training, others = step(params, stats, images)[0], step(params, stats, changed)[0]
    assert np.max(np.abs(in_training[0] - others[0])) > 1e-2


def test_shortcut_without_parameters():
    """A block that adds nothing: every other pixel, channels of zeros on both sides."""
    block = BasicBlock(4, 8, stride=2, projections=False, dtype=jnp.float32, rngs=nnx.Rngs(0))
    block.bn2.scale[...] = jnp.zeros(8)
    block.eval()
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 4)).astype(np.float32)
    y = np.asarray(block(x))
    np.testing.assert_array_equal(y[..., 2:6], np.maximum(x[:, [0, 2, 4]][:, :, [0, 2, 4]], 0))
    assert not y[..., [0, 1, 6, 7]].any()


def test_statistics_are_not_rounded():
    """256 - 255.3 is 0.7; with the mean in bfloat16 it would be 1."""
    norm = layers.batch_norm(1, epsilon=0.0, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.array([255.3])
    norm.eval()
    y = norm(jnp.full((1, 1), 256, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(y[0, 0]), 0.7, rtol=0.005)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "ceil_mode"),
    [(3, 2, 0, True), (2, 2, 0, True), (3, 1, 1, False), (3, 2, 1, False)],
)
@pytest.mark.parametrize("length", [6, 7])
def test_max_pool(size, stride, padding, ceil_mode, length):
    """Window by window; with `ceil_mode` as many as start inside the image."""
    x = np.random.default_rng(0).normal(size=(2, length, length, 3)).astype(np.float32)
    # The last start of a window, counted from the padding.
    last = length + padding - (1 if ceil_mode else size - padding)
    starts = [start - padding for start in range(0, last + 1, stride)]
    if ceil_mode:  # one more window only if pixels are left
        starts = [start for start in starts if start == 0 or start - stride + size < length]
    want = np.stack(
        [np.stack([_max(x, i, j, size) for j in starts], axis=1) for i in starts], axis=1
    )
    np.testing.assert_array_equal(
        layers.max_pool(x, size, stride, padding, ceil_mode=ceil_mode), want
    )


def _max(x, row, column, size):
    return x[:, max(row, 0) : row + size, max(column, 0) : column + size].max((1, 2))


@pytest.mark.parametrize("size", [4, 7, 14])
def test_auxiliary_pooling(size):
    """Averages windows from floor(i n / 4) to ceil((i + 1) n / 4), by weights of 1 and 0."""
    x = np.random.default_rng(0).normal(size=(1, size, size, 2)).astype(np.float32)
    pixels, i = np.arange(size), np.arange(4)[:, None]
    inside = (pixels >= np.floor(i * size / 4)) & (pixels < np.ceil((i + 1) * size / 4))
    weights = inside / inside.sum(1, keepdims=True)
    pooled = googlenet._window_means(googlenet._window_means(x, 4, axis=1), 4, axis=2)
    np.testing.assert_allclose(
        pooled, np.einsum("nhwc,ih,jw->nijc", x, weights, weights), atol=1e-6
    )


def test_dropout_draws_from_the_rngs_of_the_call():
    head = googlenet.AuxiliaryHead(8, 10, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 14, 14, 8)).astype(np.float32)
    first, again, other = (np.asarray(head(x, rngs=nnx.Rngs(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.max(np.abs(first - other)) > 1e-3
    with pytest.raises(ValueError, match="rngs"):
        head(x)
    head.eval()
    assert head(x).shape == (2, 10)


def test_transform_input():
    """Renormalises ImageNet's images to 0.5 and 0.5."""
    pixels = np.random.default_rng(0).uniform(size=(1, 33, 33, 3)).astype(np.float32)
    imagenet = (pixels - np.array([0.485, 0.456, 0.406], np.float32)) / np.array(
        [0.229, 0.224, 0.225], np.float32
    )
    params, stats = weights(abstract("googlenet", auxiliary_heads=False))
    plain, transformed = (
        jax.jit(
            forward(abstract("googlenet", auxiliary_heads=False, transform_input=option), False)
        )(params, stats, images)[0]
        for option, images in ((False, (pixels - 0.5) / 0.5), (True, imagenet))
    )
    np.testing.assert_allclose(plain, transformed, rtol=1e-3, atol=1e-5 * np.max(np.abs(plain)))
