"""The default mask on common trees: kernels, not biases, norms and tables of two axes."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cbp_jax
from cbp_jax.masking import flatten_with_paths, path_string

LAYERS, WIDTH = 3, 8


def normal(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def filled(make):
    """The tree that is made, filled with random numbers: its own initializers would be compiled."""
    return jax.tree.map(lambda leaf: jnp.asarray(normal(*leaf.shape)), jax.eval_shape(make))


def constrained(params, **arguments):
    state = cbp_jax.cbp("ternary", **arguments).init(params)
    return [path_string(path) for path, _ in flatten_with_paths(state.multipliers)]


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, rngs=rngs, decode=False)
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs, bias_init=nnx.initializers.normal())


class NNXTransformer(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(16, WIDTH, rngs=nnx.Rngs(0))
        self.position_table = nnx.Param(jax.random.normal(jax.random.key(0), (4, WIDTH)))
        self.blocks = nnx.vmap(NNXBlock, in_axes=0, out_axes=0)(nnx.Rngs(0).split(LAYERS))


def scanned_nnx():
    kernels = [f"blocks/attention/{name}/kernel" for name in ("key", "out", "query", "value")]
    params = filled(lambda: nnx.state(NNXTransformer(), nnx.Param))
    return params, [*kernels, "blocks/dense/kernel"]


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        x = nn.LayerNorm(scale_init=nn.initializers.normal())(x)
        x = nn.Dense(WIDTH, bias_init=nn.initializers.normal())(x)
        return nn.Conv(WIDTH, (3,), use_bias=True)(x), None


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        table = self.param("pos_embedding", nn.initializers.normal(), (4, WIDTH))
        stacked = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        blocks = nn.scan(LinenBlock, length=LAYERS, **stacked)
        return blocks(name="blocks")(nn.Embed(16, WIDTH)(tokens) + table, None)[0]


def scanned_linen():
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = filled(lambda: LinenTransformer().init(jax.random.key(0), tokens))
    return params, ["params/blocks/Conv_0/kernel", "params/blocks/Dense_0/kernel"]


class EquinoxBlock(eqx.Module):
    conv: eqx.nn.Conv2d
    ln1: eqx.nn.LayerNorm
    mlp: eqx.nn.Linear

    def __init__(self, key):
        self.conv = eqx.nn.Conv2d(4, 5, 3, key=key)
        self.ln1 = eqx.nn.LayerNorm(WIDTH)
        self.mlp = eqx.nn.Linear(WIDTH, WIDTH, key=key)


class EquinoxNetwork(eqx.Module):
    stem: eqx.nn.Conv2d
    wte: eqx.nn.Embedding
    blocks: EquinoxBlock

    def __init__(self):
        self.stem = eqx.nn.Conv2d(1, 4, 3, key=jax.random.key(1))
        self.wte = eqx.nn.Embedding(16, WIDTH, key=jax.random.key(2))
        self.blocks = eqx.filter_vmap(EquinoxBlock)(jax.random.split(jax.random.key(0), LAYERS))


def scanned_equinox():
    params = filled(lambda: eqx.filter(EquinoxNetwork(), eqx.is_inexact_array))
    return params, ["stem/weight", "blocks/conv/weight", "blocks/mlp/weight"]


@pytest.mark.parametrize(
    "make", [scanned_nnx, scanned_linen, scanned_equinox], ids=lambda make: make.__name__
)
def test_only_kernels_are_constrained(make):
    params, kernels = make()
    assert constrained(params) == kernels
    mask = flatten_with_paths(cbp_jax.select()(params))
    assert [path_string(path) for path, flag in mask if flag] == kernels
    assert constrained(params, scale_axis=(0, -1)) == kernels


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("dense/kernel", (4, 4), True),
        ("w", (4, 4), True),
        ("normal_layer/kernel", (4, 4), True),  # only whole words count
        ("scale_net/unbiased/kernel", (4, 4), True),  # a bias or scale is named by the last key
        ("conv/kernel", (3, 1, 1, 8), True),
        ("conv/weight", (8, 1, 1), False),
        ("dense/kernel", (8,), False),
        ("query/bias", (2, 4), False),
        ("rel_bias", (2, 4), False),
        ("lora_b", (2, 4), True),
        ("LayerNorm_0/scale", (2, 4), False),
        ("rmsnorm/weight", (2, 4), False),
        ("bn1/weight", (2, 4), False),
        ("tok_embeddings/weight", (2, 4), False),
        ("posEmbed", (2, 4), False),
    ],
)
def test_names_and_shapes(path, shape, expected):
    tree = normal(*shape)
    for key in reversed(path.split("/")):
        tree = {key: tree}
    assert (path in constrained({**tree, "other": {"kernel": jnp.ones((2, 2))}})) == expected


def test_b_is_a_bias_beside_w():
    stacked = {"w": normal(3, 4, 4), "b": normal(3, 4)}
    assert constrained({"layer": stacked, "b": stacked["b"]}) == ["b", "layer/w"]


@pytest.mark.parametrize(
    ("shape", "axes"), [((3, 8), (0, -1)), ((1, 8), -1), ((2, 3, 4), (0, 1, 2))]
)
def test_a_scale_per_weight_is_refused(shape, axes):
    params = {"layers": {"kernel": normal(*shape)}}
    link = cbp_jax.cbp("ternary", scale_axis=axes, mask=True)
    with pytest.raises(ValueError, match=r"keeps every axis of 'layers/kernel'.*mask=cbp_jax.sel"):
        link.init(params)
    with pytest.raises(ValueError, match="keeps every axis"):
        jax.eval_shape(link.init, params)
