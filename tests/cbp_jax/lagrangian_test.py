"""The three forms of the constraint's part of the Lagrangian against numpy, and what a step with it needs in memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import cbp_jax
from cbp_jax import lagrangian
from cbp_jax.state import constrained_leaves

FORMS = {
    "plain": lagrangian._sum_directly,
    "rows": lagrangian._sum_in_rows,
    "blocks": lagrangian._sum_in_blocks,
}
# Blocks of several matrices and parts of one, rows of 64 and of none, nothing at all.
SHAPES = [
    (5, 64),
    (3, 3, 7, 16),
    (40, 61),
    (3, 48, 8),
    (30, 2, 3),
    (509,),
    (200, 1),
    (0, 4),
    (4, 0),
    (),
]
WINDOW = 3.0


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(lagrangian, "_BLOCK", 48)
    monkeypatch.setattr(lagrangian, "_GROUPS", 4)
    jax.clear_caches()
    yield
    jax.clear_caches()


def leaf_of(shape, axes=(), constraint="two_bit_shift", dtype=np.float32):
    rng = np.random.default_rng(0)
    w, multiplier = rng.normal(size=shape), rng.normal(size=shape)
    scale = rng.uniform(
        0.5, 1.5, tuple(n if axis in axes else 1 for axis, n in enumerate(shape)) if axes else ()
    )
    arrays = (jnp.asarray(array, dtype) for array in (w, scale, multiplier))
    return lagrangian.ConstrainedLeaf((), next(arrays), cbp_jax.get_constraint(constraint), *arrays)


def expected(leaf, window=WINDOW):
    """In numpy, from the sorted levels."""
    w, scale = np.asarray(leaf.weight, np.float64), np.asarray(leaf.scale, np.float64)
    levels = np.multiply.outer(leaf.constraint.levels, np.broadcast_to(scale, w.shape))
    distance = 2 * np.abs(w - levels).min(axis=0)
    below = np.clip((w >= levels).sum(axis=0) - 1, 0, len(levels) - 2)
    gap = np.take_along_axis(np.diff(levels, axis=0), below[None], axis=0)[0]
    counts = (w < levels[0]) | (w > levels[-1]) | (distance <= gap * (1 - 1 / window))
    return np.sum(np.asarray(leaf.multiplier, np.float64) * distance * counts)


def run(form, leaves, window=WINDOW):
    products = [lagrangian._weighted_violation(leaf.constraint) for leaf in leaves]
    arrays = zip(*((leaf.weight, leaf.scale, leaf.multiplier) for leaf in leaves), strict=True)
    return jax.jit(functools.partial(FORMS[form], products))(*arrays, window)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_tensor(form, shape):
    with jax.enable_x64(True):
        leaf = leaf_of(shape, dtype=np.float64)
        total, window = run(form, [leaf])
        np.testing.assert_allclose(total, expected(leaf), rtol=1e-12)
        assert total.dtype == jnp.float64
        assert window == WINDOW


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axes", [(1,), (0,), (0, 1), (2,), (0, 2)], ids=str)
@pytest.mark.parametrize("shape", [(9, 8, 5), (3, 48, 8), (30, 2, 3)], ids=str)
def test_scales_by_channel(form, shape, axes):
    with jax.enable_x64(True):
        leaf = leaf_of(shape, axes, dtype=np.float64)
        np.testing.assert_allclose(run(form, [leaf])[0], expected(leaf), rtol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_several_tensors_constraints_and_dtypes(form):
    leaves = [leaf_of((40, 61), constraint=name) for name in ("binary", "ternary")]
    leaves.append(
        leaf_of((40, 61), dtype=jnp.bfloat16)._replace(constraint=cbp_jax.one_bit_shift())
    )
    total, _ = run(form, leaves)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, sum(map(expected, leaves)), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(form, bad):
    leaf = leaf_of((40, 61))
    leaf = leaf._replace(
        multiplier=leaf.multiplier.at[39, 60].set(bad), weight=leaf.weight.at[39, 60].set(5.0)
    )
    total, window = run(form, [leaf])
    np.testing.assert_equal(np.asarray(total), bad)
    assert window == WINDOW  # whatever the sum is


@pytest.mark.parametrize("form", FORMS)
def test_vmap(form):
    """An ensemble, each with weights, scale, multipliers and window of its own."""
    leaf, factors = leaf_of((40, 61)), jnp.array([0.5, 1.0, 2.0])
    product = lagrangian._weighted_violation(leaf.constraint)

    def total(factor):
        arrays = ((factor**2 * leaf.weight,), (factor * leaf.scale,), (factor * leaf.multiplier,))
        return FORMS[form]([product], *arrays, WINDOW * factor)[0]

    members = [
        leaf._replace(
            weight=f**2 * leaf.weight, scale=f * leaf.scale, multiplier=f * leaf.multiplier
        )
        for f in factors
    ]
    wanted = [
        expected(member, WINDOW * float(f)) for member, f in zip(members, factors, strict=True)
    ]
    np.testing.assert_allclose(jax.vmap(total)(factors), wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((4, 8), None),  # less than two blocks
        ((96, 8), (1, 1, 4, 12, 2, 8)),  # two rows from each of four groups
        ((3, 48, 8), (3, 1, 4, 6, 2, 8)),
        ((97, 8), None),  # a prime number of rows is one block
        ((30, 2, 3), (3, 10, 1, 1, 2, 3)),  # ten matrices a block, since 8 do not divide 30
    ],
    ids=str,
)
def test_layout_of_blocks(shape, layout):
    assert lagrangian._block_layout(shape) == layout


def test_each_platform_has_its_form():
    """Lowered for each, as `jax.export` does, without having one."""
    leaf = leaf_of((40, 64))
    marks = {"cpu": "stablehlo.while", "cuda": "stablehlo.optimization_barrier"}

    def run(w, scale, multiplier):
        return lagrangian.constraint_sum(
            [leaf._replace(weight=w, scale=scale, multiplier=multiplier)], jnp.float32(WINDOW)
        )

    for platform in ("cpu", "cuda", "rocm", "tpu"):
        text = jax.export.export(jax.jit(run), platforms=[platform])(
            leaf.weight, leaf.scale, leaf.multiplier
        ).mlir_module()
        wanted = marks.get("cuda" if platform == "rocm" else platform)
        assert {mark for mark in marks.values() if mark in text} == (
            {wanted} if wanted else set()
        ), platform


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("form", FORMS)
def test_sharded_weights_keep_their_sharding(axis_type, form, monkeypatch):
    """In several blocks, beside weights that are not sharded: those must not become so."""
    if form != "blocks":
        monkeypatch.setattr(lagrangian, "_sum_in_blocks", FORMS[form])  # as another platform would
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,), devices=jax.devices("cpu")[:4])
    specs = {"in": P("model", None), "out": P(None, "model"), "whole": P()}
    rng = np.random.default_rng(0)
    alone = {key: jnp.float32(rng.normal(size=(64, 64))) for key in specs}
    assert lagrangian._block_layout((64, 64)) == (1, 1, 4, 16, 1, 64)
    params = {
        key: jax.device_put(alone[key], NamedSharding(mesh, spec)) for key, spec in specs.items()
    }
    optimizer = optax.chain(
        cbp_jax.cbp("ternary", steps_per_epoch=1, patience=1), optax.sgd(0.1, momentum=0.9)
    )

    def step(params, state):
        updates, state = optimizer.update(
            jax.tree.map(jnp.sin, params), state, params, value=jnp.float32(1)
        )
        return optax.apply_updates(params, updates), state

    state, its_state = optimizer.init(params), optimizer.init(alone)
    for _ in range(3):
        params, state = jax.jit(step)(params, state)
        alone, its_state = jax.jit(step)(alone, its_state)
    for key, spec in specs.items():
        assert params[key].sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), key
    np.testing.assert_allclose(state[0].lagrangian_sum, its_state[0].lagrangian_sum, rtol=1e-5)


@pytest.mark.parametrize("constraint", ["binary", "two_bit_shift"])
def test_a_donated_step_copies_neither_weights_nor_multipliers(constraint, monkeypatch):
    """Not for the sum, which reads what the step overwrites, and not for the branch that moves the multipliers now and then."""
    monkeypatch.undo()
    params = {f"layer{i}": jnp.full((1024, 1024), 0.1) for i in range(4)}
    optimizer = optax.chain(cbp_jax.cbp(constraint), optax.sgd(0.1, momentum=0.9))

    def step(params, state, grads, value):
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    assert len(constrained_leaves(params, state)) == 4
    compiled = (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params, jnp.float32(0)).compile()
    )
    memory = compiled.memory_analysis()
    tensor = 4 * 1024 * 1024
    assert (
        memory.alias_size_in_bytes >= 5 * 4 * tensor
    )  # weights, momentum, multipliers, two moments: all in place
    assert memory.temp_size_in_bytes < 2 * tensor  # a copy of one would be 4
