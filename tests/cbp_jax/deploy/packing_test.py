"""Packed weights: their bits, the round trip to what `quantize` gives, and what is refused."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from trees import INITIAL, KINDS, nested_dict, network

import cbp_jax
from cbp_jax.deploy.bits import pack_bits, unpack_bits

CONSTRAINTS = [
    cbp_jax.binary(),
    cbp_jax.ternary(),
    cbp_jax.one_bit_shift(),
    cbp_jax.two_bit_shift(),
    cbp_jax.shift(6),
    cbp_jax.uniform(5),
    cbp_jax.uniform(9),
    cbp_jax.Constraint("mine", (-1.0, -0.0, 0.3, 2.0, 5.0)),
]


def identical(a, b):
    """Equal to the bit: 0 is not -0."""
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert identical(x, y)


def assert_round_trip(params, state):
    """Packs and unpacks to what `quantize` gives; returns the packed weights."""
    packed = cbp_jax.pack(params, state, round=True)
    assert_identical(cbp_jax.unpack(packed), cbp_jax.quantize(params, state))
    return packed


def weights(shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def state_of(params, constraint="ternary", **options):
    return cbp_jax.cbp(constraint, **options).init(params)


# Bits


def string_of_bits(codes, bits):
    """The definition, with Python's integers."""
    number = sum(int(code) << (i * bits) for i, code in enumerate(codes))
    return np.frombuffer(number.to_bytes((len(codes) * bits + 7) // 8, "little"), np.uint8)


@pytest.mark.parametrize("bits", [*range(1, 13), 16, 17])
def test_bits(bits):
    sizes = (0, 1, 7, 8, 29)
    codes = [np.random.default_rng(size).integers(0, 2**bits, size) for size in sizes]

    @jax.jit
    def there_and_back(codes):
        packed = [pack_bits(array, bits) for array in codes]
        unpacked = [unpack_bits(p, bits, size) for p, size in zip(packed, sizes, strict=True)]
        return packed, unpacked

    for array, packed, unpacked in zip(codes, *there_and_back(codes), strict=True):
        np.testing.assert_array_equal(packed, string_of_bits(array, bits))
        np.testing.assert_array_equal(unpacked, array)


# There and back


@pytest.mark.parametrize(
    ("shape", "scale_axis", "dtype"),
    [
        ((3, 3, 5, 7), (0, -1), jnp.float32),
        ((129, 33), -1, jnp.bfloat16),
        ((13, 3), None, jnp.float16),
        ((1, 1), -1, jnp.float32),
        ((0, 4), -1, jnp.float32),
    ],
)
def test_equals_quantize(shape, scale_axis, dtype):
    """A layer with each constraint, compiled; the other tests compute without."""
    layers = {constraint.name: constraint for constraint in CONSTRAINTS}
    params = {name: weights(shape, dtype, seed) for seed, name in enumerate(layers)}
    params["bias"] = weights((3,))
    state = state_of(params, layers, scale_axis=scale_axis)
    packed = cbp_jax.pack(params, state, round=True)
    assert_identical(jax.jit(cbp_jax.unpack)(packed), jax.jit(cbp_jax.quantize)(params, state))
    for name, constraint in layers.items():
        codes = packed.tensors[name].codes
        assert codes.nbytes == math.ceil(math.prod(shape) * constraint.bits / 8)
        assert isinstance(codes, np.ndarray)


def test_equals_quantize_without_compiling():
    params = {constraint.name: weights((3, 3, 5, 7)) for constraint in CONSTRAINTS}
    layers = {constraint.name: constraint for constraint in CONSTRAINTS}
    assert_round_trip(params, state_of(params, layers, scale_axis=(0, -1)))


def test_equals_quantize_in_float64():
    with jax.enable_x64(True):
        params = {"kernel": weights((17, 9), jnp.float64)}
        state = state_of(params, cbp_jax.uniform(3))
        packed = assert_round_trip(params, state)
        assert packed.tensors["kernel"].scale.dtype == np.float64
    with pytest.raises(cbp_jax.PackedError, match=r"'kernel' is float64.*jax_enable_x64"):
        cbp_jax.unpack(packed)


def test_zero_scale_of_a_channel():
    params = {"kernel": jnp.array([[0.0, -1.0], [0.0, 2.0]])}
    state = state_of(params, "binary", scale_axis=-1)
    assert_round_trip(params, state)
    moved = {"kernel": params["kernel"].at[:, 0].set(0.5)}
    with pytest.raises(ValueError, match="kernel: 4 weights, by up to inf"):
        cbp_jax.pack(moved, state)


@pytest.mark.parametrize("kind", KINDS)
def test_trees(kind):
    params = network(kind).params
    state = state_of(params)
    packed = cbp_jax.pack(params, state, round=True)
    assert_identical(cbp_jax.unpack(packed, params), cbp_jax.quantize(params, state))
    shapes = jax.eval_shape(lambda: params)
    assert_identical(cbp_jax.unpack(packed, shapes), cbp_jax.quantize(params, state))


def test_without_a_template_it_is_nested_dictionaries():
    params = network(KINDS[1]).params  # tuples
    tree = cbp_jax.unpack(cbp_jax.pack(params, state_of(params), round=True))
    assert {key: set(inner) for key, inner in tree.items()} == {"0": {"0", "1"}, "1": {"0", "1"}}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="a/~01.", max_size=3), min_size=1, max_size=3))
def test_names_keep_paths_apart(keys):
    tree = weights((2, 2))
    for key in reversed(keys):
        tree = {key: tree, key + "x": jnp.zeros(1)}
    state = state_of(tree)
    assert len(assert_round_trip(tree, state).tensors) == len(keys) + 1


def test_single_leaf():
    leaf = weights((4, 4))
    assert list(assert_round_trip(leaf, state_of(leaf)).tensors) == [""]


def test_batch_statistics_are_stored_unchanged():
    class Block(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    model = Block()
    optimizer = nnx.Optimizer(model, cbp_jax.cbp_sgd(0.1, "two_bit_shift"), wrt=nnx.Param)
    everything = nnx.state(model, (nnx.Param, nnx.BatchStat))
    restored = cbp_jax.unpack(cbp_jax.pack(everything, optimizer.opt_state, round=True), everything)
    assert_identical(restored, cbp_jax.quantize(everything, optimizer.opt_state))
    assert {"mean", "var"} <= set(restored["norm"])

    params = {"kernel": weights((3, 3))}
    stats = {"norm": {"mean": jnp.arange(3.0), "steps": jnp.array(7)}}
    packed = cbp_jax.pack({**params, "batch_stats": stats}, state_of(params), round=True)
    assert_identical(cbp_jax.unpack(packed)["batch_stats"], stats)


def test_several_links():
    params = {"a": weights((3, 3)), "b": weights((3, 3), seed=1), "c": weights((2,))}
    optimizer = optax.chain(
        cbp_jax.cbp("binary", mask={"a": True, "b": False, "c": False}),
        cbp_jax.cbp("two_bit_shift", mask={"a": False, "b": True, "c": False}),
    )
    packed = assert_round_trip(params, optimizer.init(params))
    assert [packed.tensors[name].constraint.bits for name in "ab"] == [1, 3]


def test_sharded_weights():
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))
    whole = {"kernel": weights((8, 12))}
    params = jax.device_put(whole, NamedSharding(mesh, P("x", "y")))
    state = state_of(whole, "two_bit_shift", scale_axis=-1)
    assert cbp_jax.pack(params, state, round=True) == cbp_jax.pack(whole, state, round=True)


def test_dtype_to_compute_in():
    params = {"kernel": weights((5, 5)), "bias": weights((5,))}
    state = state_of(params)
    tree = cbp_jax.unpack(cbp_jax.pack(params, state, round=True), dtype=jnp.bfloat16)
    assert identical(tree["kernel"], cbp_jax.quantize(params, state)["kernel"].astype(jnp.bfloat16))
    assert tree["bias"].dtype == jnp.float32


# Refusals


def test_refuses_weights_off_their_levels():
    params = {"a": jnp.array([[0.5, -0.5, 0.5, 0.5]]), "b": jnp.array([[1.0, -1.0]])}
    state = state_of(params, "binary")
    exact = cbp_jax.pack(params, state)
    assert [(entry.moved, entry.furthest) for entry in exact.rounding] == [(0, 0.0), (0, 0.0)]
    near = {"a": params["a"].at[0, 0].set(0.504), "b": params["b"]}
    assert cbp_jax.pack(near, state) == exact  # 0.8% of the scale
    moved = params["a"].at[0, :2].set(jnp.array([0.75, -0.51]))
    off = {"a": moved, "b": params["b"].at[0, 0].set(0.25)}
    message = (
        "2 of 2 constrained layers.*a: 2 weights, by up to 0.5 of the scale; "
        "b: 1 weights, by up to 0.75 of the scale.*round=True"
    )
    with pytest.raises(ValueError, match=message):
        cbp_jax.pack(off, state)
    rounded = cbp_jax.pack(off, state, round=True)
    assert rounded == exact
    assert rounded.rounding == (("a", 2, 0.5), ("b", 1, 0.75))
    assert re.search(r"^a +binary +4 +1 +5 +2 +0\.5$", str(rounded), re.MULTILINE)


def test_rounding_is_not_part_of_the_pytree():
    params = {"kernel": weights((4, 4))}
    packed = cbp_jax.pack(params, state_of(params), round=True)
    assert jax.tree.map(lambda x: x, packed).rounding == ()
    assert jax.tree.map(lambda x: x, packed) == packed


def test_equality():
    def pack(params, constraint="ternary"):
        return cbp_jax.pack(params, state_of(params, constraint), round=True)

    params = {"kernel": weights((4, 4)), "bias": jnp.zeros(2)}
    packed = pack(params)
    assert packed == pack(params)
    assert packed != pack({**params, "bias": -params["bias"]})  # -0
    assert packed != pack(params, "binary")
    assert packed != pack({"kernel": params["kernel"]})
    assert packed != "another thing"


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_refuses_nan_and_infinity(bad):
    params = {"kernel": jnp.ones((2, 2))}
    state = state_of(params)
    broken = {"kernel": params["kernel"].at[0, 0].set(bad)}
    with pytest.raises(ValueError, match="kernel.*" + ("NaN" if np.isnan(bad) else "by up to inf")):
        cbp_jax.pack(broken, state)
    state = state._replace(weight_scale={"kernel": jnp.array(bad)})
    with pytest.raises(ValueError, match=r"'kernel'.*scale is not finite"):
        cbp_jax.pack(params, state, round=True)


def test_refuses_leaves_that_are_not_arrays():
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(TypeError, match=r"'shape'.*it is ShapeDtypeStruct"):
        cbp_jax.pack({**params, "shape": jax.ShapeDtypeStruct((2,), jnp.float32)}, state_of(params))
    with pytest.raises(TypeError, match=r"'key'.*random key"):
        cbp_jax.pack({**params, "key": jax.random.key(0)}, state_of(params))


# Templates


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"kernel": (3, 4)}, r"the template has no 'hidden/bias'.*it has 'hidden/kernel'"),
        (
            {"kernel": (4, 3), "bias": (4,)},
            r"'hidden/kernel' has shape \(3, 4\), but the template's has \(4, 3\)",
        ),
        (
            {"kernel": (3, 4), "bias": (4,), "extra": ()},
            "packed weights have no 'hidden/extra'.*'hidden/kernel'",
        ),
    ],
)
def test_template_that_does_not_fit(template, message):
    params = {"hidden": nested_dict(INITIAL).params["hidden"]}
    packed = cbp_jax.pack(params, state_of(params), round=True)
    leaves = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in template.items()}
    with pytest.raises(cbp_jax.PackedError, match=message):
        cbp_jax.unpack(packed, {"hidden": leaves})
