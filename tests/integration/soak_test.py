"""200,000 jitted steps: one compilation, and flat memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import pytest

import cbp_jax

STEPS, WARM = 200_000, 20_000
PARAMS = {"kernel": jnp.linspace(-1.0, 1.0, 24).reshape(6, 4), "bias": jnp.ones(4)}
OPTIMIZERS = {
    "cbp": lambda: optax.chain(
        cbp_jax.cbp("ternary", steps_per_epoch=100, patience=3), optax.adam(1e-3)
    ),
    "closing": lambda: cbp_jax.closing(optax.adam(1e-3), "ternary", STEPS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_memory_is_flat(name):
    optimizer, process = OPTIMIZERS[name](), psutil.Process()

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: jnp.sum((p["kernel"] - 0.3) ** 2))(params)
        updates, state = optimizer.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    params, state, warm = PARAMS, optimizer.init(PARAMS), 0
    for count in range(1, STEPS + 1):
        params, state = step(params, state)
        if count % 1000 == 0:
            jax.block_until_ready(params)
        if count == WARM:
            warm = process.memory_info().rss
    grown = process.memory_info().rss - warm
    print(f"{name}: {grown / 2**20:.1f} MiB more than after {WARM:,} steps")
    assert grown < 16 * 2**20
    assert step._cache_size() <= 2  # the first state has weak types
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))
    if name == "closing":
        assert float(cbp_jax.constraint_failure_score(params, state)) == 0
