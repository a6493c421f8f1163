"""Strategies for the arguments that a program might make up, by kind of argument."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import cbp_jax

W = {"layer": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.ones(2)}, "none": None}
NAN, INF = float("nan"), float("inf")

# Of no kind in particular.
SPECIAL = (
    *(None, True, False, NAN, INF, -INF, 1e300, -1e300, 1e-300, 10**400, -(10**400), 2**40, 1j),
    *("1", "", "binary", b"x", (), (1,), (0, 1), [], [1.0], {}, object(), print, len, dict),
    *(np.float32(0.5), np.float16(-1), np.int8(3), np.bool_(True), np.str_("binary")),
    *(np.array(2), np.ones(2), np.array("a"), np.array(None), np.zeros(0)),
    *(jnp.array(0.5), jnp.array(4), jnp.array(-1), jnp.array(NAN), jnp.ones(3), jnp.array(1j)),
    *(jnp.array(True), jax.random.key(0), jax.ShapeDtypeStruct((), jnp.float32)),
    *(optax.adam, optax.sgd(0.1), range(3), W),
)
THINGS = st.sampled_from(SPECIAL)
NUMBERS = st.one_of(st.integers(-3, 30), st.floats(-1e6, 1e6), THINGS)
TEXT = st.one_of(
    st.text(max_size=4), st.sampled_from(["layer/kernel", ".*", "(", "a{99999999999}", "(?i)B.*"])
)
FUNCTIONS = st.one_of(
    st.none(),
    THINGS,
    st.builds(lambda value: lambda *_: value, NUMBERS),
    st.just(lambda first, *_: first),
)
DTYPES = st.one_of(
    st.sampled_from([*("float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "int8")]),
    st.sampled_from([float, complex, str, jnp.bfloat16, jnp.float32, np.dtype("float16")]),
    THINGS,
)
AXES = st.one_of(st.none(), st.integers(-3, 3), st.tuples(NUMBERS), THINGS)
PATTERNS = st.one_of(st.none(), TEXT, st.lists(st.one_of(TEXT, THINGS), max_size=2), THINGS)
OPTIMIZERS = st.one_of(
    st.sampled_from([optax.sgd(0.1), optax.adam(1e-3), optax.MultiSteps(optax.sgd(1.0), 2)]), THINGS
)
RULES = st.one_of(
    st.sampled_from([*cbp_jax.CONSTRAINTS, cbp_jax.shift(3), cbp_jax.uniform(5), "quinary"]), THINGS
)
SPECS = st.one_of(RULES, st.dictionaries(TEXT, RULES, max_size=2))

# Few shapes and values, so that JAX compiles few programs.
ARRAYS = st.builds(
    lambda make, fill, shape, dtype: make(np.full(shape, fill).astype(dtype)),
    st.sampled_from([np.asarray, jnp.asarray]),
    st.sampled_from([0.0, 1.0, -0.3, 1e-40, 3e38, 6e4, NAN, INF]),
    st.sampled_from([(), (2, 2), (1, 2), (0, 2), (2, 2, 2)]),
    st.sampled_from([np.float16, jnp.bfloat16, np.float32, np.float64, np.int32, bool, complex]),
)
LEAVES = st.one_of(ARRAYS, NUMBERS, st.just(jax.ShapeDtypeStruct((2, 2), jnp.float32)))
_KEYS = st.sampled_from(["layer", "kernel", "bias", "", "a/b"])


def with_kernel(leaf):
    """The parameters with another kernel."""
    return {**W, "layer": {**W["layer"], "kernel": leaf}}


def trees(leaves):
    """Trees of the structure of the parameters, and of others."""
    others = st.recursive(
        leaves,
        lambda nodes: st.one_of(
            st.dictionaries(_KEYS, nodes, max_size=2),
            st.lists(nodes, max_size=2),
            st.tuples(nodes, nodes),
        ),
        max_leaves=4,
    )
    return st.one_of(st.just(W), st.builds(with_kernel, leaves), others)


TREES = trees(LEAVES)
_BOOLS = st.one_of(
    st.just({"layer": {"kernel": True, "bias": False}, "none": None}),
    st.booleans(),
    trees(st.one_of(st.booleans(), NUMBERS)),
)
MASKS = st.one_of(_BOOLS, st.builds(lambda mask: lambda params: mask, _BOOLS), FUNCTIONS)
