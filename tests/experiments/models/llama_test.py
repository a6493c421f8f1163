"""The decoder, beside one in numpy and float64; what it sees; what is constrained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import models
from common.models import llama
from flax import nnx

import cbp_jax

SIZES = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 24}
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 7)).astype(np.int32)


def create(**changes):
    """A small network whose weights are large enough for attention to be uneven."""
    model = models.create("llama", rngs=nnx.Rngs(0), **{**SIZES, **changes})
    graphdef, params, batch_stats = models.split_model(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda w: rng.normal(size=w.shape).astype(np.float32), params)
    return nnx.merge(graphdef, params, batch_stats), params


def rotate(x):
    """Neighbouring channels of (length, heads, channels) as complex numbers that turn."""
    length, _, channels = x.shape
    turns = np.arange(length)[:, None] * 10_000.0 ** (-2 * np.arange(channels // 2) / channels)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * turns)[:, None]
    return np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


def normalize(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


def rotate_halves(x):
    """As Hugging Face does: x cos + rotate_half(x) sin, the angles repeated for both halves."""
    length, _, channels = x.shape
    frequencies = 10_000.0 ** (-np.arange(0, channels, 2) / channels)
    angles = np.arange(length)[:, None, None] * np.concatenate([frequencies, frequencies])
    first, second = np.split(x, 2, axis=-1)
    return x * np.cos(angles) + np.concatenate([-second, first], axis=-1) * np.sin(angles)


def attention(x, weights, heads, kv_heads, rotate):
    """One head and one position after another."""
    length, channels = len(x), x.shape[1] // heads
    q, k, v = ((x @ weights[name]["kernel"]).reshape(length, -1, channels) for name in "qkv")
    q, k, output = rotate(q), rotate(k), np.zeros((length, heads, channels))
    for head in range(heads):
        shared = head * kv_heads // heads
        for t in range(length):
            shares = np.exp(q[t, head] @ k[: t + 1, shared].T / np.sqrt(channels))
            output[t, head] = shares @ v[: t + 1, shared] / shares.sum()
    return output.reshape(length, -1) @ weights["o"]["kernel"]


def mlp(x, weights):
    gate, up = x @ weights["gate"]["kernel"], x @ weights["up"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * up) @ weights["down"]["kernel"]


def logits(params, tokens, heads, kv_heads, rotate=rotate):
    """Of one window."""
    x = params["embed"]["embedding"][tokens]
    for _, block in sorted(params["blocks"].items()):
        y = normalize(x, block["attention_norm"]["scale"])
        x = x + attention(y, block["attention"], heads, kv_heads, rotate)
        x = x + mlp(normalize(x, block["mlp_norm"]["scale"]), block["mlp"])
    return normalize(x, params["norm"]["scale"]) @ params["head"]["kernel"]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_logits_are_numpys(kv_heads):
    model, params = create(kv_heads=kv_heads)
    params = jax.tree.map(np.float64, params)
    expected = [logits(params, tokens, 4, kv_heads) for tokens in TOKENS]
    actual = model(jnp.asarray(TOKENS))
    assert (actual.shape, actual.dtype) == ((2, 7, 256), jnp.float32)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())


def test_pairs_of_neighbours_turn():
    x = np.random.default_rng(0).normal(size=(3, 2, 9, 8)).astype(np.float32)
    expected = [rotate(window.swapaxes(0, 1)).swapaxes(0, 1) for window in np.float64(x)]
    np.testing.assert_allclose(llama.rotate(jnp.asarray(x)), expected, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_weights_of_a_network_that_rotates_halves(kv_heads):
    """Logits are that network's once queries and keys are reordered, and not before."""
    model, params = create(kv_heads=kv_heads)
    exact = jax.tree.map(np.float64, params)
    expected = [logits(exact, tokens, 4, kv_heads, rotate_halves) for tokens in TOKENS]
    largest = np.abs(expected).max()
    assert np.abs(model(jnp.asarray(TOKENS)) - np.array(expected)).max() > 0.1 * largest
    for block in params["blocks"].values():
        for name, heads in (("q", 4), ("k", kv_heads)):
            layer = block["attention"][name]
            layer["kernel"] = llama.neighbouring_pairs(jnp.asarray(layer["kernel"]), heads)
    nnx.update(model, params)
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), expected, atol=1e-4 * largest)


def test_odd_heads_have_no_pairs():
    with pytest.raises(ValueError, match="12 outputs are not 4 heads of an even number"):
        llama.neighbouring_pairs(jnp.zeros((2, 12)), 4)


def test_a_product_depends_on_the_distance_alone():
    q, k = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    turned_q, turned_k = (np.asarray(llama.rotate(jnp.tile(x, (1, 1, 9, 1)))[0, 0]) for x in (q, k))
    products = turned_q @ turned_k.T
    for distance in range(9):
        along = np.diagonal(products, distance)
        np.testing.assert_allclose(along, along[0], rtol=0, atol=1e-4)
    assert np.ptp(products) > 0.1


def test_no_token_sees_a_later_one():
    model, _ = create()
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 256
    before, after = (np.asarray(model(jnp.asarray(tokens))) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (np.abs(before - after)[:, 4:].max(axis=-1) > 1e-3).all()


def test_grouped_heads_are_full_ones_with_repeated_keys():
    grouped, params = create(kv_heads=2)
    full, _ = create(kv_heads=4)
    for block in params["blocks"].values():
        for name in "kv":
            kernel = block["attention"][name]["kernel"].reshape(16, 2, 4)
            block["attention"][name]["kernel"] = kernel.repeat(2, axis=1).reshape(16, 16)
    nnx.update(full, params)
    tokens = jnp.asarray(TOKENS)
    np.testing.assert_allclose(full(tokens), grouped(tokens), rtol=1e-4, atol=1e-3)


def test_a_layer_on_levels_is_any_of_attention_or_mlp():
    model, params = create()
    assert models.split_model(model)[2] == {}
    mask = cbp_jax.select(include=model.constrained)(params)
    for block in mask["blocks"].values():
        kernels = [*block["attention"].values(), *block["mlp"].values()]
        assert kernels == [{"kernel": True}] * 7
        assert block["attention_norm"] == block["mlp_norm"] == {"scale": False}
    rest = {name: mask[name] for name in ("embed", "norm", "head")}
    assert not any(jax.tree.leaves(rest))


def test_how_wide_weights_start():
    """Kernels that end a shortcut, by the number of shortcuts."""
    model = models.create("llama", width=64, depth=8, rngs=nnx.Rngs(0))
    block = model.blocks[3]
    for layer in (block.attention.q, block.attention.v, block.mlp.gate, block.mlp.up, model.head):
        assert np.std(layer.kernel[...]) == pytest.approx(0.02, rel=0.05)
    for layer in (block.attention.o, block.mlp.down):
        assert np.std(layer.kernel[...]) == pytest.approx(0.005, rel=0.05)
    assert np.std(model.embed.embedding[...]) == pytest.approx(0.02, rel=0.05)


def test_bfloat16_is_of_the_activations_alone():
    model, params = create(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    exact, _ = create()
    tokens = jnp.asarray(TOKENS)
    assert model(tokens).dtype == jnp.float32
    assert model.blocks[0](jnp.ones((7, 16), jnp.bfloat16), 7).dtype == jnp.bfloat16
    correlation = np.corrcoef(np.ravel(model(tokens)), np.ravel(exact(tokens)))[0, 1]
    assert 0.99 < correlation < 1


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"heads": 16}, {"kv_heads": 3}])
def test_heads_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="heads must divide width into even"):
        create(**sizes)
