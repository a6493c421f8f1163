"""The three ways to find a step, against numpy: exact on every edge and just beside it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax import step_function as module
from cbp_jax.step_function import step_function

IRREGULAR = (*np.cumsum(np.linspace(0.1, 1.0, 40)),)
CASES = {
    "chain": cbp_jax.two_bit_shift().levels,
    "division, 5 bits": cbp_jax.uniform(5).levels,
    "division, 12 bits": cbp_jax.uniform(12).levels,
    "division, integers": tuple(map(float, range(-128, 128))),
    "bisection, powers": cbp_jax.shift(12).levels,
    "bisection, irregular": IRREGULAR,
}


def ways(monkeypatch):
    """The names of the ways that are taken from here on."""
    taken = []

    def recorded(name, function):
        return lambda *args: taken.append(name) or function(*args)

    for name in ("_divide", "_bisect"):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return taken


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_against_numpy(case, dtype, monkeypatch):
    levels = CASES[case]
    taken = ways(monkeypatch)
    edges = tuple((low + high) / 2 for low, high in itertools.pairwise(levels))
    ends = np.asarray([0, np.inf, -np.inf, 1e30, -1e30, np.nan], dtype)
    results = {dtype: levels, "int32": range(len(levels))}

    @jax.jit
    def run(w, scale):
        return [step_function(w, scale, edges, v, d) for d, v in results.items()]

    with jax.enable_x64(dtype == "float64"):
        for scale in np.asarray([1.0, 0.037, 3e-20, 7e10], dtype):
            at = np.asarray(edges, dtype) * scale
            w = np.concatenate([at, np.nextafter(at, -np.inf), np.nextafter(at, np.inf), ends])
            w = np.asarray(w, dtype)
            index = np.where(np.isnan(w), 0, np.searchsorted(at, w, side="right"))
            for result, (name, values) in zip(run(w, scale), results.items(), strict=True):
                assert result.dtype == name
                np.testing.assert_array_equal(result, np.asarray(values, name)[index])
    way = case.split(",")[0]
    assert set(taken) == {"chain": set(), "division": {"_divide"}, "bisection": {"_bisect"}}[way]


def test_a_scale_of_zero_has_a_level():
    for constraint in (cbp_jax.uniform(8), cbp_jax.shift(12)):
        np.testing.assert_array_equal(constraint.quantize(jnp.array([-1.0, 0.0, 2.0]), 0.0), 0)


def test_uniform_levels_are_float32_numbers():
    for bits in range(2, 13):
        levels = np.asarray(cbp_jax.uniform(bits).levels)
        midpoints = (levels[1:] + levels[:-1]) / 2
        np.testing.assert_array_equal(np.float32(levels), levels)
        np.testing.assert_array_equal(np.float32(midpoints), midpoints)
