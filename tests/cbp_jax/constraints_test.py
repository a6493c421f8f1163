"""The constraints against brute force over all their levels, by numpy in float64."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import cbp_jax

NAMED = [cbp_jax.binary(), cbp_jax.ternary(), cbp_jax.one_bit_shift(), cbp_jax.two_bit_shift()]
BUILT_IN = [
    *NAMED,
    *map(cbp_jax.shift, range(6)),
    *map(cbp_jax.uniform, range(2, 7)),
    cbp_jax.shift(9),
]
DTYPES = ["float32", "float64", "bfloat16", "float16"]
WINDOWS = [1.0, 1.5, 2.0, 7.0, 20.0, 1e3, math.inf]
SHAPE = (4, 24)  # one shape, so that jax compiles each operation once

settings = hypothesis.settings(max_examples=25, deadline=None)


@st.composite
def user_constraints(draw, max_levels=24):
    """Levels at multiples of 1/16, for exact midpoints and gaps; more than 16 are bisected."""
    levels = draw(st.lists(st.integers(-64, 64), min_size=2, max_size=max_levels, unique=True))
    return cbp_jax.Constraint("user", sorted(level / 16 for level in levels))


constraints = st.sampled_from(BUILT_IN) | user_constraints()


@st.composite
def weights(draw, constraint, dtype):
    """A scale, or one per row; weights near, between and outside the levels, exact in `dtype`."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = (SHAPE[0], 1) if draw(st.booleans()) else ()
    scale = np.float32(2.0 ** rng.uniform(-8, 4, size))
    levels = np.array(constraint.levels)
    spread = rng.normal(size=SHAPE) * np.abs(levels).max()
    near = rng.choice(levels, SHAPE) + rng.normal(size=SHAPE) * 0.02
    w = np.where(rng.random(SHAPE) < 0.5, spread, near) * scale
    w[0, :3] = 0, levels[0] * 100 * np.max(scale), -levels[0] * 100 * np.max(scale)
    return scale, np.asarray(jnp.asarray(w, dtype), np.float64)


def tolerance(dtype, constraint, scale):
    """How far a level may be rounded in the dtype that it is computed in, or stored in."""
    info = jnp.finfo(dtype)
    largest = np.max(np.abs(constraint.levels)) * scale
    return float(info.eps) * largest + float(info.smallest_subnormal)


def compute_dtype(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def inner_midpoints(constraint):
    return (np.array(constraint.levels)[1:] + np.array(constraint.levels)[:-1]) / 2


def away_from(points, scale, w, margin):
    targets = np.multiply.outer(np.broadcast_to(scale, w.shape), points)
    return np.min(np.abs(w[..., None] - targets), axis=-1) > margin


@pytest.mark.parametrize("dtype", DTYPES)
@settings
@hypothesis.given(data=st.data(), constraint=constraints)
def test_quantize_picks_the_nearest_level_and_stays_there(dtype, data, constraint):
    with jax.enable_x64(dtype == "float64"):
        scale, w = data.draw(weights(constraint, dtype))
        q = constraint.quantize(jnp.asarray(w, dtype), scale)
        assert q.dtype == dtype
        np.testing.assert_array_equal(constraint.quantize(q, scale), q)
        rounding = tolerance(dtype, constraint, scale)
        exact = reference.quantize(constraint.levels, scale, w)
        margin = tolerance(compute_dtype(dtype), constraint, scale)
        decided = away_from(inner_midpoints(constraint), scale, w, margin)
        error = np.abs(np.asarray(q, np.float64) - exact)
        assert np.all((error <= rounding) | ~decided)
        index = np.asarray(constraint.level_index(jnp.asarray(w, dtype), scale))
        assert index.dtype == np.int32
        assert np.all((index == reference.nearest_index(constraint.levels, scale, w)) | ~decided)


@settings
@hypothesis.given(data=st.data(), constraint=st.sampled_from(BUILT_IN))
def test_quantize_is_odd_for_symmetric_levels(data, constraint):
    scale, w = data.draw(weights(constraint, "float32"))
    one_sided = away_from(inner_midpoints(constraint), scale, w, 0)
    q, mirrored = (np.asarray(constraint.quantize(sign * np.float32(w), scale)) for sign in (1, -1))
    assert np.all((mirrored == -q) | ~one_sided)


@settings
@hypothesis.given(
    constraint=st.sampled_from([*NAMED, *map(cbp_jax.shift, range(6))]) | user_constraints(),
    power=st.integers(-9, 9),
)
def test_a_midpoint_goes_to_the_upper_level(constraint, power):
    scale = 2.0**power  # keeps midpoints exact
    midpoints, above, below = (
        np.resize(np.float32(x) * np.float32(scale), 32)  # one shape for all
        for x in (inner_midpoints(constraint), constraint.levels[1:], constraint.levels[:-1])
    )
    np.testing.assert_array_equal(constraint.quantize(midpoints, scale), above)
    just_below = np.nextafter(midpoints, -np.inf, dtype=np.float32)
    # Subnormal numbers are flushed to zero, and zero is a midpoint.
    just_below = np.where(midpoints == 0, np.float32(-1e-30), just_below)
    np.testing.assert_array_equal(constraint.quantize(just_below, scale), below)
    np.testing.assert_array_equal(constraint.violation_grad(midpoints, scale), -2)


def test_a_binary_weight_of_zero_is_not_left_between_the_levels():
    assert cbp_jax.binary().quantize(0.0, 0.5) == 0.5
    assert cbp_jax.binary().violation(0.0, 0.5) == 1
    assert cbp_jax.binary().violation_grad(0.0, 0.5) == -2


WAYS = [cbp_jax.binary(), cbp_jax.uniform(6), cbp_jax.shift(9)]


@pytest.mark.parametrize("constraint", WAYS, ids=["chain", "division", "bisection"])
def test_nan_stays_nan_and_infinity_goes_to_the_outermost_level(constraint):
    w = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])
    q = np.asarray(constraint.quantize(w, 0.5))
    np.testing.assert_array_equal(np.isnan(q), [True, False, False, False])
    outermost = [constraint.levels[-1] / 2, constraint.levels[0] / 2]
    np.testing.assert_allclose(q[1:3], outermost, rtol=1e-6)
    violation = np.asarray(constraint.violation(w, 0.5))
    assert np.isnan(violation[0])
    np.testing.assert_array_equal(violation[1:3], np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@settings
@hypothesis.given(data=st.data(), constraint=constraints, window=st.sampled_from(WINDOWS))
def test_violation_and_gradient_agree_with_brute_force(dtype, data, constraint, window):
    with jax.enable_x64(dtype == "float64"):
        scale, w = data.draw(weights(constraint, dtype))
        leaf = jnp.asarray(w, dtype)
        violation = constraint.violation(leaf, scale, window)
        gradient = constraint.violation_grad(leaf, scale, window)
        assert violation.dtype == gradient.dtype == compute_dtype(dtype)
        distance = 2 * np.abs(w - reference.quantize(constraint.levels, scale, w))
        gap, threshold = reference.gap_and_threshold(constraint.levels, scale, w, window)
        eps = float(jnp.finfo(compute_dtype(dtype)).eps)
        rounding = 4 * (tolerance(dtype, constraint, scale) + eps * np.abs(w))
        # Where the window ends, and at a midpoint, rounding decides.
        decided = (np.abs(distance - threshold) > rounding) & (np.abs(distance - gap) > rounding)
        expected = reference.violation(constraint.levels, scale, w, window)
        difference = np.abs(np.asarray(violation) - expected)
        assert np.all((difference <= rounding) | ~decided)
        off_level = distance > rounding
        expected = reference.violation_grad(constraint.levels, scale, w, window)
        assert np.all((np.asarray(gradient) == expected) | ~(decided & off_level))
        np.testing.assert_array_equal(np.asarray(gradient)[np.asarray(violation) == 0], 0)


@settings
@hypothesis.given(data=st.data(), constraint=constraints)
def test_violation_never_falls_as_the_window_closes(data, constraint):
    scale, w = data.draw(weights(constraint, "float32"))
    by_window = np.stack([constraint.violation(np.float32(w), scale, g) for g in WINDOWS])
    assert np.all(np.diff(by_window, axis=0) >= 0)
    # At the start only what lies outside the levels counts.
    outside = (w < constraint.levels[0] * scale) | (w > constraint.levels[-1] * scale)
    off_level = away_from(constraint.levels, scale, w, 1e-6 * scale)
    assert not np.any(by_window[0][off_level & ~outside])
    assert np.all(by_window[0][off_level & outside] > 0)


@settings
@hypothesis.given(data=st.data(), constraint=constraints, window=st.sampled_from(WINDOWS))
def test_gradient_is_that_of_the_violation(data, constraint, window):
    scale, w = data.draw(weights(constraint, "float32"))
    leaf = jnp.asarray(w, jnp.float32)
    by_jax = jax.grad(lambda x: jnp.sum(constraint.violation(x, scale, window)))(leaf)
    differentiable = away_from(constraint.levels, scale, w, 0)
    gradient = np.asarray(constraint.violation_grad(leaf, scale, window))
    np.testing.assert_array_equal(gradient[differentiable], np.asarray(by_jax)[differentiable])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_level_violates_nothing(dtype, compiled):
    """Whatever the leaf's dtype rounds; compiled too, as XLA may skip a cast to it and back."""
    scales = np.float32(np.geomspace(1e-3, 30, 16))[:, None]

    def on_levels(scale):
        results = []
        for constraint in (cbp_jax.two_bit_shift(), cbp_jax.uniform(3), cbp_jax.uniform(6)):
            levels = jnp.asarray(constraint.levels, dtype) * scale.astype(dtype)
            w = constraint.quantize(levels, scale)
            for window in (1.0, math.inf):
                results.append(constraint.violation(w, scale, window))
                results.append(constraint.violation_grad(w, scale, window))
        return results

    with jax.enable_x64(dtype == "float64"):
        for result in (jax.jit(on_levels) if compiled else on_levels)(scales):
            np.testing.assert_array_equal(result, 0)


@pytest.mark.parametrize("constraint", [*NAMED, cbp_jax.uniform(6)], ids=lambda c: c.name)
def test_a_scale_of_zero_constrains_nothing(constraint):
    w = jnp.array([[jnp.nan, 1.0, -jnp.inf], [-1.0, 0.0, 0.5]])
    scale = jnp.array([[0.0], [0.25]])
    for window in (1.0, 3.0, math.inf):
        violation = constraint.violation(w, scale, window)
        np.testing.assert_array_equal(violation[0], 0)
        np.testing.assert_array_equal(constraint.violation_grad(w, scale, window)[0], 0)
        expected = reference.violation(constraint.levels, 0.25, -1.0, window)
        assert violation[1, 0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("number", [2, 16, 17, 32, 33, 1000])
def test_many_levels(number):
    """Around the change from a chain of compares to a bisection, on levels with no pattern."""
    levels = np.sort(np.random.default_rng(number).choice(4096, number, replace=False)) / 64.0
    constraint = cbp_jax.Constraint("many", levels)
    spread = np.linspace(-1, 65, 999), [-1e9, 1e9]
    w = np.resize(np.concatenate([levels, inner_midpoints(constraint), *spread]), 3000)
    w = np.float32(w)
    index = np.searchsorted(inner_midpoints(constraint), w, side="right")
    np.testing.assert_array_equal(constraint.level_index(w, 1.0), index)
    np.testing.assert_array_equal(constraint.quantize(w, 1.0), np.float32(levels)[index])
    violation = reference.violation(levels, 1.0, np.float64(w), 3.0)
    gap, threshold = reference.gap_and_threshold(levels, 1.0, np.float64(w), 3.0)
    decided = np.abs(2 * np.abs(w - levels[index]) - threshold) > 1e-4
    ours = np.asarray(constraint.violation(w, 1.0, 3.0))
    np.testing.assert_allclose(ours[decided], violation[decided], rtol=1e-5, atol=1e-5)
    assert decided.mean() > 0.9
    assert np.all(gap > 0)


def test_names_levels_and_bits():
    assert cbp_jax.binary().levels == (-1, 1)
    assert cbp_jax.shift(0).levels == cbp_jax.ternary().levels == (-1, 0, 1)
    assert cbp_jax.shift(1).levels == cbp_jax.one_bit_shift().levels == (-1, -0.5, 0, 0.5, 1)
    assert cbp_jax.shift(2).levels == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    assert cbp_jax.shift(2).levels == cbp_jax.two_bit_shift().levels
    assert [c.bits for c in NAMED] == [1, 2, 3, 3]
    assert [cbp_jax.uniform(bits).bits for bits in range(2, 7)] == [2, 3, 4, 5, 6]
    for number, bits in {2: 1, 3: 2, 4: 2, 5: 3, 8: 3, 9: 4, 16: 4, 17: 5}.items():
        assert cbp_jax.Constraint("n", range(number)).bits == bits
    for constraint in NAMED:
        assert cbp_jax.get_constraint(constraint.name) == constraint
        assert cbp_jax.get_constraint(constraint) is constraint


@pytest.mark.parametrize(("bits", "step"), [(2, 1.224), (3, 0.6508), (4, 0.3534)])
def test_uniform_has_the_published_steps(bits, step):
    """Max (1960), table II, for a unit Gaussian, whose mean absolute value is sqrt(2 / pi)."""
    levels = np.array(cbp_jax.uniform(bits).levels)
    numbers = np.arange(len(levels)) - len(levels) // 2
    np.testing.assert_allclose(levels / (step * math.sqrt(math.pi / 2)), numbers, rtol=2e-3)


@pytest.mark.parametrize("bits", range(2, 7))
def test_uniform_is_optimal_on_gaussian_weights(bits):
    """By numeric integration: the best step is `E[x k] / E[k^2]`, where k numbers x's level."""
    levels = np.array(cbp_jax.uniform(bits).levels) / math.sqrt(math.pi / 2)
    x = (np.arange(400_000) + 0.5) * 4e-5 - 8
    density = np.exp(-(x**2) / 2)
    highest, step = 2 ** (bits - 1) - 1, levels[-1] / (2 ** (bits - 1) - 1)
    assert len(levels) == 2 * highest + 1

    def number(step):
        return np.clip(np.rint(x / step), -highest, highest)

    def error(step):
        return np.average((x - step * number(step)) ** 2, weights=density)

    k = number(step)
    regressed = np.average(x * k, weights=density) / np.average(k * k, weights=density)
    assert regressed == pytest.approx(step, rel=1e-4)
    assert error(step) < min(error(0.98 * step), error(1.02 * step))


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        ((1.0, -1.0), "strictly increasing"),
        ((-1.0, 0.0, 0.0, 1.0), "strictly increasing"),
        ((1.0,), "at least two"),
        ((), "at least two"),
        ((-1.0, math.inf), "finite"),
        ((-1.0, math.nan, 1.0), "finite"),
    ],
)
def test_wrong_levels(levels, says):
    with pytest.raises(ValueError, match=f"'mine'.*{says}"):
        cbp_jax.Constraint("mine", levels)


def test_levels_that_are_not_numbers():
    for levels in (None, 3.0, (None, 1.0), (1j, 2.0)):
        with pytest.raises(TypeError):
            cbp_jax.Constraint("mine", levels)
    with pytest.raises(TypeError, match="name must be a string"):
        cbp_jax.Constraint((-1.0, 1.0), "mine")


def test_unknown_names():
    names = "'binary', 'ternary', 'one_bit_shift', 'two_bit_shift'"
    with pytest.raises(ValueError, match=rf"unknown.*'ternery'.*{names}.*mean 'ternary'"):
        cbp_jax.get_constraint("ternery")
    for wrong in (2, None, ["binary"]):
        with pytest.raises(TypeError, match="a name or a Constraint"):
            cbp_jax.get_constraint(wrong)


@pytest.mark.parametrize("depth", [-1, 65, 1.0, True, "1"])
def test_wrong_depth(depth):
    with pytest.raises(ValueError, match="integer depth"):
        cbp_jax.shift(depth)


@pytest.mark.parametrize("bits", [1, 0, 13, 3.0, True, "3"])
def test_wrong_bits(bits):
    with pytest.raises(ValueError, match="2 to 12"):
        cbp_jax.uniform(bits)


def test_a_constraint_is_a_static_hashable_value():
    mine = cbp_jax.Constraint("mine", [-1, np.float32(0.5)])
    assert mine == cbp_jax.Constraint("mine", (-1.0, 0.5))
    assert hash(mine) == hash(cbp_jax.Constraint("mine", (-1.0, 0.5)))
    assert len({mine, cbp_jax.binary(), cbp_jax.get_constraint("binary")}) == 2
    with pytest.raises(AttributeError):
        mine.levels = (0.0, 1.0)
    assert jax.tree.leaves(mine) == []
    assert jax.jit(lambda c: c)(mine) == mine
    params, rules = {"kernel": jnp.ones((2, 2))}, ("binary", cbp_jax.binary(), "ternary")
    states = [cbp_jax.cbp(rule).init(params) for rule in rules]
    same, as_well, other = map(jax.tree.structure, states)
    assert same == as_well
    assert same != other


def test_nothing_escapes_an_infinite_window():
    """Not even where a level is too small for the leaf's dtype, and is 0 in it."""
    cases = (cbp_jax.shift(6), 2.0**-10, 2.5e-5), (cbp_jax.uniform(8), 1e-4, 3e-6)
    for constraint, scale, w in cases:
        violation = np.asarray(constraint.violation(jnp.float16([w]), scale), np.float64)
        assert violation > 0
        np.testing.assert_array_less(0, np.abs(constraint.violation_grad(jnp.float16([w]), scale)))
