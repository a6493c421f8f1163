"""The proximal maps beside closed forms, and beside the implementation of PARQ's authors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common.training import proximal

import cbp_jax

CONSTRAINTS = [*map(cbp_jax.get_constraint, cbp_jax.CONSTRAINTS), cbp_jax.uniform(4)]
UNEVEN = cbp_jax.Constraint("uneven", (-0.9, -0.2, 0.3, 1.7))
SCALE, START, END = 0.37, 20, 120


def weights(constraint, count=4001):
    """Weights well beyond the levels, none within 1e-4 of a midpoint."""
    rng = np.random.default_rng(0)
    w = rng.uniform(2 * constraint.levels[0], 2 * constraint.levels[-1], count) * SCALE
    levels = np.array(constraint.levels) * SCALE
    middles = (levels[1:] + levels[:-1]) / 2
    return np.float32(w[np.abs(w[:, None] - middles).min(axis=1) > 1e-4])


def sigmoid_by_definition(step, steepness, center):
    def f(x):
        return 1 / (1 + np.exp(steepness * (x - center)))

    x = np.clip((step - START) / (END - START), 0, 1)
    return (f(x) - f(1.0)) / (f(0.0) - f(1.0))


@pytest.mark.parametrize("steepness", [0.5, 10.0, 60.0])
@pytest.mark.parametrize("center", [0.3, 0.5])
def test_the_sigmoid_is_normalized(steepness, center):
    fall = jax.jit(lambda step: proximal.mirrored_sigmoid(step, START, END, steepness, center))
    ends = [float(fall(step)) for step in (0, START, END, END + 50)]
    assert ends == pytest.approx([1, 1, 0, 0], rel=1e-6, abs=0)
    steps = np.arange(START + 1, END)
    np.testing.assert_allclose(
        jax.vmap(fall)(steps), sigmoid_by_definition(steps, steepness, center), rtol=1e-4
    )


@pytest.mark.parametrize("constraint", [*CONSTRAINTS, UNEVEN], ids=lambda c: c.name)
def test_parq_between_the_ends(constraint):
    """The weights clipped to the levels at 1, the nearest level at 0, ramps between."""
    w, parq = weights(constraint), jax.jit(proximal.parq, static_argnums=1)
    levels = np.array(constraint.levels) * SCALE
    np.testing.assert_allclose(
        parq(w, constraint, SCALE, 1.0), np.clip(w, levels[0], levels[-1]), atol=1e-6
    )
    nearest = levels[np.abs(w[:, None] - levels).argmin(axis=1)]
    np.testing.assert_allclose(parq(w, constraint, SCALE, 0.0), nearest, atol=1e-6)
    np.testing.assert_allclose(parq(w, constraint, SCALE, 1e-6), nearest, atol=1e-6)
    # Between two levels, a ramp that is 1 / 0.25 steep around the midpoint.
    above = np.clip(np.searchsorted(levels, w), 1, len(levels) - 1)
    low, high = levels[above - 1], levels[above]
    ramp = np.clip((low + high) / 2 + (w - (low + high) / 2) / 0.25, low, high)
    np.testing.assert_allclose(parq(w, constraint, SCALE, 0.25), ramp, atol=2e-6)


def test_one_scale_per_channel():
    w, scale = jnp.array([[0.3, 0.3], [-0.1, -0.1]]), jnp.array([[0.4, 0.0]])
    for function, number in ((proximal.parq, 0.5), (proximal.binary_relax, 0.5)):
        both = function(w, cbp_jax.ternary(), scale, number)
        alone = function(w[:, 0], cbp_jax.ternary(), 0.4, number)
        np.testing.assert_array_equal(both[:, 0], alone)
        assert np.isfinite(both).all()


def test_binary_relax_mixes_weights_and_levels():
    w = jnp.array([-0.5, 0.1, 0.3], jnp.float32)
    mixed = proximal.binary_relax(w, cbp_jax.binary(), 0.2, 0.25)
    np.testing.assert_allclose(mixed, [-0.425, 0.125, 0.275], rtol=1e-6)
    np.testing.assert_array_equal(proximal.binary_relax(w, cbp_jax.binary(), 0.2, 0.0), w)


@pytest.mark.parametrize("constraint", [*CONSTRAINTS, UNEVEN], ids=lambda c: c.name)
@pytest.mark.parametrize("step", [START, 21, 45, 70, 100, 118, 119, END, 500])
def test_the_authors_maps(constraint, step):
    """At the same step of the same annealing, which is theirs."""
    torch = pytest.importorskip("torch", reason='needs the extra: pip install -e ".[torch]"')
    reason = 'needs the extra: pip install -e ".[torch]"'
    pytest.importorskip("torchao.prototype.parq", reason=reason)
    from torchao.prototype.parq.optim import ProxBinaryRelax, ProxPARQ

    w = np.float64(weights(constraint))  # steep ramps multiply float32's rounding
    levels = torch.tensor(np.array(constraint.levels) * SCALE)

    def theirs(proximal_map):
        p = torch.tensor(w)
        proximal_map.apply_(p, None, levels, step)
        return p.numpy()

    with jax.enable_x64(True):
        for steepness in (1.0, 10.0, 20.0):
            inverse_slope = proximal.mirrored_sigmoid(step, START, END, steepness)
            np.testing.assert_allclose(
                proximal.parq(w, constraint, SCALE, inverse_slope),
                theirs(ProxPARQ(START, END, steepness)),
                atol=1e-6,
            )
        theta = proximal.rise(step, START, END)
        np.testing.assert_allclose(
            proximal.binary_relax(w, constraint, SCALE, theta),
            theirs(ProxBinaryRelax(START, END)),
            atol=1e-6,
        )
