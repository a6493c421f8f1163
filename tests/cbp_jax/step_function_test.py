"""The three ways to look up a step against numpy, exactly: on every edge, and one rounding step to either side of it."""

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
    """Names of the ways that are taken from here on."""
    taken = []
    for name in ("_divide", "_bisect"):
        function = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *args, name=name, function=function: taken.append(name) or function(*args),
        )
    return taken


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_against_numpy(name, dtype, monkeypatch):
    levels = CASES[name]
    taken = ways(monkeypatch)
    with jax.enable_x64(dtype == "float64"):
        for scale in np.asarray([1.0, 0.037, 3e-20, 7e10], dtype):
            edges = np.asarray([(low + high) / 2 for low, high in itertools.pairwise(levels)])
            at = np.asarray(edges, dtype) * scale
            w = np.concatenate(
                [
                    at,
                    np.nextafter(at, -np.inf),
                    np.nextafter(at, np.inf),
                    [0, np.inf, -np.inf, 1e30, -1e30, np.nan],
                ]
            )
            w = np.asarray(w, dtype)
            index = np.where(np.isnan(w), 0, np.searchsorted(at, w, side="right"))
            for values, result_dtype in ((levels, dtype), (range(len(levels)), "int32")):
                run = jax.jit(
                    lambda w, scale, e=tuple(edges), v=values, d=result_dtype: step_function(
                        w, scale, e, v, d
                    )
                )
                result = run(jnp.asarray(w), jnp.asarray(scale))
                assert result.dtype == result_dtype
                np.testing.assert_array_equal(result, np.asarray(values, result_dtype)[index])
    way = name.split(",")[0]
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
