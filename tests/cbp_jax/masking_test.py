"""Paths, patterns and masks, over the kinds of trees that users have."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cbp_jax
from cbp_jax.masking import flatten_with_paths, path_string

ONES = jnp.ones((2, 2))


def tree():
    return {
        "stem": {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)},
        "block1": {"conv": {"kernel": jnp.ones((3, 3, 2, 2))}, "norm": {"scale": jnp.ones(2)}},
        "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "step": jnp.ones((2, 2), jnp.int32),
    }


class Network(nnx.Module):
    def __init__(self):
        layers = [nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1))]
        self.layers = nnx.List(layers)
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(2))


def paths(tree):
    return [path_string(path) for path, _ in flatten_with_paths(tree)]


def constrained(constraint="binary", params=None, **arguments):
    """The paths of the leaves that a link constrains."""
    state = cbp_jax.cbp(constraint, **arguments).init(tree() if params is None else params)
    return paths(state.multipliers)


def true_paths(mask):
    return [path_string(path) for path, flag in flatten_with_paths(mask) if flag]


def test_default_is_floating_leaves_of_two_or_more_axes():
    kernels = ["block1/conv/kernel", "head/kernel", "stem/kernel"]
    assert constrained() == true_paths(cbp_jax.select()(tree())) == kernels


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("block1/.*", None, ["block1/conv/kernel", "block1/norm/scale"]),
        (".*/kernel", "head/.*", ["block1/conv/kernel", "stem/kernel"]),
        (None, ["head/.*", "stem/.*"], ["block1/conv/kernel"]),
        (["stem/kernel", "head/bias"], None, ["head/bias", "stem/kernel"]),
        (("stem/.*", "head/.*"), ".*/bias", ["head/kernel", "stem/kernel"]),
        ("step", None, ["step"]),
        ([], None, []),
    ],
)
def test_select(include, exclude, expected):
    mask = cbp_jax.select(include, exclude)(tree())
    assert jax.tree.structure(mask) == jax.tree.structure(tree())
    assert all(type(flag) is bool for flag in jax.tree.leaves(mask))
    assert true_paths(mask) == expected


def test_patterns_match_whole_paths():
    with pytest.raises(ValueError, match="'head'"):
        cbp_jax.select("head")(tree())
    with pytest.raises(ValueError, match="'kernel'"):
        cbp_jax.select("kernel")(tree())


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_lists_near_misses(argument):
    mask = cbp_jax.select(**{argument: [".*/kernel", "blok1/conv/kernel"]})
    message = r"'blok1/conv/kernel' matches none of the 7 paths.*near misses: block1/conv/kernel"
    with pytest.raises(ValueError, match=message):
        mask(tree())
    with pytest.raises(ValueError, match="near misses"):
        cbp_jax.cbp("binary", mask=mask).init(tree())


def test_a_pattern_far_from_every_path_lists_the_paths():
    with pytest.raises(ValueError, match=r"'zzz'.*block1/conv/kernel"):
        cbp_jax.select("zzz")(tree())


@pytest.mark.parametrize("pattern", ["conv[", ["fine", "(("], [3]])
def test_select_refuses_wrong_patterns(pattern):
    with pytest.raises(ValueError, match="not a pattern"):
        cbp_jax.select(include=pattern)


NOTHING = dict.fromkeys(tree(), False)
DEEPER = {"block1": {"conv": True, "norm": False}, "head": {"kernel": np.True_, "bias": False}}
MASKS = {
    "prefix": ({**NOTHING, "stem": True}, ["stem/bias", "stem/kernel"]),
    "deeper prefix": ({**NOTHING, **DEEPER}, ["block1/conv/kernel", "head/kernel"]),
    "callable prefix": (lambda _: {**NOTHING, "head": True}, ["head/bias", "head/kernel"]),
    "callable tree": (lambda p: jax.tree.map(lambda w: w.ndim == 4, p), ["block1/conv/kernel"]),
    "one bool": (False, []),
    "callable bool": (lambda _: False, []),
}


@pytest.mark.parametrize(("mask", "expected"), MASKS.values(), ids=MASKS)
def test_masks(mask, expected):
    assert constrained(mask=mask) == expected


def test_one_bool_for_all():
    params = {"a": jnp.ones(2), "b": ONES}
    assert constrained(params=params, mask=True) == ["a", "b"]


@pytest.mark.parametrize(
    "mask", [{"stem": True}, {**NOTHING, "extra": True}, {**NOTHING, "stem": [True, False]}]
)
def test_refuses_masks_of_another_structure(mask):
    with pytest.raises(ValueError, match="neither a tree like the parameters nor a prefix"):
        cbp_jax.cbp("binary", mask=mask).init(tree())


@pytest.mark.parametrize(
    "mask", [dict.fromkeys(NOTHING, 1), dict.fromkeys(NOTHING, "yes"), "stem/kernel"]
)
def test_refuses_masks_of_other_types(mask):
    with pytest.raises(TypeError, match="a mask holds bools"):
        cbp_jax.cbp("binary", mask=mask).init(tree())


def test_a_mask_over_integers_names_the_leaf():
    with pytest.raises(TypeError, match="'step' cannot be constrained: it is int32"):
        cbp_jax.cbp("binary", mask=True).init(tree())


def test_warns_if_nothing_is_constrained():
    with pytest.warns(UserWarning, match="constrains nothing"):
        cbp_jax.cbp("binary").init({"bias": jnp.ones(3)})


def test_paths_of_sequences_and_attributes():
    layer = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert paths([{"w": ONES}, (ONES, ONES)]) == ["0/w", "1/0", "1/1"]
    assert paths({"a": [layer]}) == ["a/0/weight", "a/0/bias"]
    assert paths(ONES) == ["(root)"]
    assert paths({"a/b": ONES}) == ["a/b"]
    assert paths({3: ONES, 11: ONES}) == ["3", "11"]


def test_a_single_array_is_a_tree():
    assert constrained(params=ONES) == ["(root)"]
    assert constrained({r"\(root\)": "binary"}, params=ONES) == ["(root)"]


def test_paths_of_nnx_drop_the_variable():
    params = nnx.state(Network(), nnx.Param)
    layers = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel"]
    expected = [*layers, "norm/bias", "norm/scale"]
    assert paths(params) == expected
    assert paths(nnx.to_pure_dict(params)) == expected
    mask = cbp_jax.select(exclude="layers/1/.*")
    assert constrained(params=params, mask=mask) == ["layers/0/kernel"]
    assert constrained({"layers/1/kernel": "ternary"}, params=params) == ["layers/1/kernel"]


def test_select_keeps_nnx_variables_and_equinox_modules():
    nnx_params = nnx.state(Network(), nnx.Param)
    eqx_params = eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    for params in (nnx_params, eqx_params):
        mask = cbp_jax.select(exclude=".*bias")(params)
        assert jax.tree.structure(mask) == jax.tree.structure(params)
        matrices = jax.tree.map(lambda flag, w: flag and w.ndim > 1, mask, params)
        assert constrained(params=params, mask=matrices)
    path = "layers/1/weight"
    assert constrained(params=eqx_params, mask=cbp_jax.select(path)) == [path]


def test_an_equinox_module_of_bools_is_a_mask_although_it_can_be_called():
    layer = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    mask = eqx.tree_at(lambda m: (m.weight, m.bias), layer, (True, False))
    assert callable(mask)
    assert constrained(params=layer, mask=mask) == ["weight"]


def test_a_key_called_value_is_kept():
    params = {"value": ONES, "attention": {"value": {"kernel": ONES}, "query": {"value": ONES}}}
    assert paths(params) == ["attention/query/value", "attention/value/kernel", "value"]
    path = "attention/query/value"
    assert constrained(params=params, mask=cbp_jax.select(path)) == [path]

    class Attention(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(ONES)
            self.inner = nnx.Dict(value=nnx.Param(ONES))

    assert paths(nnx.state(Attention(), nnx.Param)) == ["inner/value", "value"]


def test_a_mapping_takes_the_first_match_and_leaves_the_rest():
    mapping = {"head/.*": None, "stem/kernel": "ternary", ".*/kernel": "binary"}
    assert constrained(mapping) == ["block1/conv/kernel", "stem/kernel"]
    constraints = cbp_jax.cbp(mapping).init(tree()).constraints
    assert constraints["stem"]["kernel"] == cbp_jax.ternary()
    assert constraints["block1"]["conv"]["kernel"] == cbp_jax.binary()
    assert constrained({"stem/.*": cbp_jax.shift(3)}) == ["stem/kernel"]


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"stem/kernle": "binary"}, "'stem/kernle' matches none.*stem/kernel"),
        ({".*": "binary", "typo": None}, "'typo' matches none"),
        ({".*/bias": "binary"}, "matches none"),  # biases are masked out
    ],
)
def test_a_mapping_whose_pattern_matches_nothing(constraint, says):
    with pytest.raises(ValueError, match=says):
        cbp_jax.cbp(constraint).init(tree())


@pytest.mark.parametrize(
    ("constraint", "error", "says"),
    [
        ({}, ValueError, "empty"),
        ({"(": "binary"}, ValueError, "not a pattern"),
        ({".*": "ternery"}, ValueError, "known"),
        (3, TypeError, "3"),
    ],
)
def test_wrong_mappings(constraint, error, says):
    with pytest.raises(error, match=says):
        cbp_jax.cbp(constraint)
