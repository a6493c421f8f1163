"""README's advice on settings: what raises the failure score, what cures it, and its benchmark."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import cbp_jax

TARGETS = jax.random.normal(jax.random.key(0), (16, 16))


def failure_scores(learning_rate, steps=2000, multiplier_rate=0.2):
    """CFS / scale after every step of SGD on noisy least squares."""
    params = {"kernel": TARGETS}
    link = cbp_jax.cbp(
        "ternary", steps_per_epoch=steps // 50, patience=1, multiplier_learning_rate=multiplier_rate
    )
    optimizer = optax.chain(link, optax.sgd(learning_rate))

    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, TARGETS.shape) / 10

        def loss_fn(p):
            return jnp.sum((p["kernel"] - TARGETS - noise) ** 2) / 2

        loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state))
        updates, state = optimizer.update(grads, state, params, value=loss)
        params = optax.apply_updates(params, updates)
        return (params, state), cbp_jax.constraint_failure_score(params, state, relative=True)

    keys = jax.random.split(jax.random.key(1), steps)
    return np.asarray(jax.lax.scan(step, (params, optimizer.init(params)), keys)[1])


def test_falling_rate_cures_oscillation():
    """At a constant rate weights overshoot their levels by it times multiplier and gradient."""
    constant = failure_scores(3e-2)
    falling = failure_scores(optax.cosine_decay_schedule(3e-2, 2000))
    assert constant[-100:].mean() > 0.02
    assert falling[-1] < constant[-100:].mean() / 20


def test_higher_multipliers_do_not_cure_oscillation():
    low, high = failure_scores(3e-2, multiplier_rate=0.2), failure_scores(3e-2, multiplier_rate=1.0)
    assert high[-100:].mean() > 2 * low[-100:].mean()


def test_closing_benchmark():
    pytest.importorskip("ml_collections", reason="needs the extra experiments")
    from benchmarks import closing, timing

    results = json.loads((timing.RESULTS / "closing.json").read_text())
    assert (timing.RESULTS / "closing.md").read_text() == closing.as_markdown(results)
    digits = closing.load()
    params = closing.initial(jax.random.key(0))
    link = cbp_jax.cbp(
        "binary", steps_per_epoch=5, patience=1, mask=cbp_jax.select(include="layer[12]/kernel")
    )
    latent, ends = closing.train(
        digits, params, optax.chain(link, optax.sgd(0.1)), 200, jax.random.key(1), True
    )
    assert ends["cfs"].shape == (4,)
    np.testing.assert_allclose(ends["latent"], closing.accuracy(digits, latent))
    assert ends["quantized"] > 0.5
