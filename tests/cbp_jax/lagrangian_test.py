"""The three forms of the constraint's sum against numpy, and the memory of a step."""

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
    lagrangian._constraint_sum.clear_cache()  # compiled with other blocks, or another form
    yield
    lagrangian._constraint_sum.clear_cache()


def leaf_of(shape, axes=(), constraint="two_bit_shift", dtype=np.float32):
    rng = np.random.default_rng(0)
    w, multiplier = rng.normal(size=shape), rng.normal(size=shape)
    scale_shape = tuple(n if axis in axes else 1 for axis, n in enumerate(shape)) if axes else ()
    scale = rng.uniform(0.5, 1.5, scale_shape)
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


def run_each(form, leaves, window=WINDOW):
    """The sum and the window of each leaf alone, compiled together."""
    products = [lagrangian._weighted_violation(leaf.constraint) for leaf in leaves]
    arrays = [((leaf.weight,), (leaf.scale,), (leaf.multiplier,)) for leaf in leaves]

    def each(arrays, window):
        pairs = zip(products, arrays, strict=True)
        return [FORMS[form]([product], *leaf, window) for product, leaf in pairs]

    return jax.jit(each)(arrays, window)


@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_scale_axes(form):
    """One tensor at a time, with a scale per tensor and with a scale per channel."""
    cases = [(shape, ()) for shape in SHAPES]
    for axes in ((1,), (0,), (0, 1), (2,), (0, 2)):
        cases += [(shape, axes) for shape in ((9, 8, 5), (3, 48, 8), (30, 2, 3))]
    with jax.enable_x64(True):
        leaves = [leaf_of(*case, dtype=np.float64) for case in cases]
        for case, leaf, (total, window) in zip(cases, leaves, run_each(form, leaves), strict=True):
            np.testing.assert_allclose(total, expected(leaf), rtol=1e-12, err_msg=str(case))
            assert total.dtype == jnp.float64
            assert window == WINDOW


@pytest.mark.parametrize("form", FORMS)
def test_several_tensors_constraints_and_dtypes(form):
    leaves = [leaf_of((40, 61), constraint=name) for name in ("binary", "ternary")]
    leaves.append(leaf_of((40, 61), constraint="one_bit_shift", dtype=jnp.bfloat16))
    total, _ = run(form, leaves)
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, sum(map(expected, leaves)), rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_a_sum_that_is_not_finite_stays_so(form):
    leaf, bad = leaf_of((40, 61)), (np.nan, np.inf)
    weight = leaf.weight.at[39, 60].set(5.0)
    multipliers = [leaf.multiplier.at[39, 60].set(number) for number in bad]
    leaves = [leaf._replace(weight=weight, multiplier=multiplier) for multiplier in multipliers]
    for number, (total, window) in zip(bad, run_each(form, leaves), strict=True):
        np.testing.assert_equal(np.asarray(total), number)
        assert window == WINDOW  # whatever the sum is


@pytest.mark.parametrize("form", FORMS)
def test_vmap(form):
    """An ensemble whose members have their own weights, scale, multipliers and window."""
    leaf, factors = leaf_of((40, 61)), jnp.array([0.5, 1.0, 2.0])
    product = lagrangian._weighted_violation(leaf.constraint)

    def total(factor):
        arrays = ((factor**2 * leaf.weight,), (factor * leaf.scale,), (factor * leaf.multiplier,))
        return FORMS[form]([product], *arrays, WINDOW * factor)[0]

    def wanted(f):
        arrays = {"scale": f * leaf.scale, "multiplier": f * leaf.multiplier}
        return expected(leaf._replace(weight=f**2 * leaf.weight, **arrays), WINDOW * float(f))

    totals = jax.jit(jax.vmap(total))(factors)
    np.testing.assert_allclose(totals, list(map(wanted, factors)), rtol=1e-4)


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
    """Lowered for each platform, as `jax.export` does, without such a device."""
    leaf = leaf_of((40, 64))
    marks = {"cpu": "stablehlo.while", "cuda": "stablehlo.optimization_barrier"}

    def run(w, scale, multiplier):
        ours = leaf._replace(weight=w, scale=scale, multiplier=multiplier)
        return lagrangian.constraint_sum([ours], jnp.float32(WINDOW))

    for platform in ("cpu", "cuda", "rocm", "tpu"):
        export = jax.export.export(jax.jit(run), platforms=[platform])
        text = export(leaf.weight, leaf.scale, leaf.multiplier).mlir_module()
        wanted = marks.get("cuda" if platform == "rocm" else platform)
        found = [mark for mark in marks.values() if mark in text]
        assert found == ([wanted] if wanted else []), platform


SPECS = {"in": P("model", None), "out": P(None, "model"), "whole": P()}
SHARDED = optax.chain(
    cbp_jax.cbp("ternary", steps_per_epoch=1, patience=1), optax.sgd(0.1, momentum=0.9)
)


def three_steps(params):
    def step(params, state):
        gradients = jax.tree.map(jnp.sin, params)
        updates, state = SHARDED.update(gradients, state, params, value=jnp.float32(1))
        return optax.apply_updates(params, updates), state

    state, step = SHARDED.init(params), jax.jit(step)
    for _ in range(3):
        params, state = step(params, state)
    return params, state[0].lagrangian_sum


@pytest.fixture(scope="module")
def alone():
    """Weights on one device, and the epoch's Lagrangian after three steps."""
    rng = np.random.default_rng(0)
    params = {key: jnp.float32(rng.normal(size=(64, 64))) for key in SPECS}
    return params, three_steps(params)[1]


@pytest.mark.parametrize(
    ("axis_type", "form"),
    [*((AxisType.Auto, form) for form in FORMS), (AxisType.Explicit, "plain")],
    ids=[*FORMS, "explicit, always plain"],
)
def test_sharded_weights_keep_their_sharding(axis_type, form, alone, monkeypatch):
    """In several blocks, beside weights that are not sharded and must stay so."""
    taken = []
    for name, function in FORMS.items():
        ours = FORMS[form] if name == "blocks" else function  # the form of another platform
        record = lambda *args, form=ours: taken.append(form) or form(*args)  # noqa: E731
        monkeypatch.setattr(lagrangian, function.__name__, record)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(axis_type,), devices=jax.devices("cpu")[:4])
    assert lagrangian._block_layout((64, 64)) == (1, 1, 4, 16, 1, 64)
    shardings = {key: NamedSharding(mesh, spec) for key, spec in SPECS.items()}
    params, total = three_steps(jax.device_put(alone[0], shardings))
    assert FORMS[form] in taken
    for key, sharding in shardings.items():
        assert params[key].sharding.is_equivalent_to(sharding, 2), key
    np.testing.assert_allclose(total, alone[1], rtol=1e-5)


@pytest.mark.parametrize("constraint", ["binary", "two_bit_shift"])
def test_a_donated_step_copies_neither_weights_nor_multipliers(constraint, monkeypatch):
    """Neither for the sum, which reads what the step overwrites, nor to move the multipliers."""
    monkeypatch.undo()
    lagrangian._constraint_sum.clear_cache()
    params = {f"layer{i}": jnp.full((1024, 1024), 0.1) for i in range(4)}
    optimizer = optax.chain(cbp_jax.cbp(constraint), optax.sgd(0.1, momentum=0.9))

    def step(params, state, grads, value):
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    assert len(constrained_leaves(params, state)) == 4
    donated = jax.jit(step, donate_argnums=(0, 1))
    memory = donated.lower(params, state, params, jnp.float32(0)).compile().memory_analysis()
    tensor = 4 * 1024 * 1024
    # Weights, momentum, multipliers and their two moments, all in place.
    assert memory.alias_size_in_bytes >= 5 * 4 * tensor
    assert memory.temp_size_in_bytes < 2 * tensor  # a copy of one would be 4
