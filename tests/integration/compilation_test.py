"""Calls outside of jit compile once: a second one takes neither time nor memory for it."""

import jax
import jax.monitoring
import jax.numpy as jnp
import optax
import pytest

import cbp_jax

PARAMS = {"dense": {"kernel": jnp.linspace(-1.0, 1.0, 35).reshape(5, 7), "bias": jnp.ones(7)}}
LINK = cbp_jax.cbp("ternary")
OPTIMIZERS = {
    "cbp": (optax.chain(LINK, optax.sgd(1e-2)), {"value": 1.0}),
    "capped": (
        cbp_jax.cbp("ternary", multiplier_optimizer=optax.chain(optax.clip(3e-3), optax.sgd(0.03))),
        {"value": 1.0},
    ),
    "cbp_sgd": (cbp_jax.cbp_sgd(1e-2, "ternary"), {"value": 1.0}),
    "closing": (cbp_jax.closing(optax.adam(1e-2), "ternary", 100), {}),
    "ste": (optax.chain(cbp_jax.ste("ternary"), optax.sgd(1e-2)), {}),
}
READERS = {
    "quantize": cbp_jax.quantize,
    "constraint_failure_score": cbp_jax.constraint_failure_score,
    "layer_report": cbp_jax.layer_report,
    "level_histogram": cbp_jax.level_histogram,
    "relative_weights": cbp_jax.relative_weights,
    "refit_scales": cbp_jax.refit_scales,
    "pack": lambda params, state: cbp_jax.pack(params, state, round=True),
}
_compiled: list[str] = []


def _listen(event, duration, **kwargs):
    del duration
    if event.endswith("backend_compile_duration"):
        _compiled.append(str(kwargs.get("fun_name")))


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiled_in(call):
    """What a call compiles."""
    _compiled.clear()
    call()
    return list(_compiled)


def test_the_listener_hears_of_a_compilation():
    assert compiled_in(lambda: jax.jit(lambda x: 2 * x + 1)(jnp.ones(3)))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_update(name):
    optimizer, extra = OPTIMIZERS[name]
    states = [optimizer.init(PARAMS)]

    def update():
        states.append(optimizer.update(PARAMS, states[-1], PARAMS, **extra)[1])

    update()
    update()  # the first state has weak types
    assert compiled_in(update) == []


@pytest.mark.parametrize("name", READERS)
def test_readers(name):
    state = LINK.init(PARAMS)
    READERS[name](PARAMS, state)
    assert compiled_in(lambda: READERS[name](PARAMS, state)) == []
