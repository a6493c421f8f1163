"""docs/when_it_does_not_close.md: each symptom on a tiny problem, and that its advice mends it."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from pages import ROOT

import cbp_jax

PAGE = (ROOT / "docs" / "when_it_does_not_close.md").read_text()
STEPS = 1200
MASK = cbp_jax.select(include="middle/kernel")
FIRST_UPDATE = (
    "only the first update so far: steps_per_epoch * patience should be a small part of your run"
)
NO_VALUE = "steps had no finite value: call optimizer.update(grads, state, params, value=loss)"


class End(NamedTuple):
    """What a run leaves."""

    params: Any
    state: Any
    report: str
    violations: jax.Array  # CFS / scale after each step
    gradient: jax.Array  # of the loss with respect to the constrained weights, the largest
    quantized_loss: float
    latent_loss: float

    @property
    def violation(self) -> float:
        return float(self.violations[-1])


def forward(params, x):
    for name in ("first", "middle"):
        x = jax.nn.relu(x @ params[name]["kernel"])
    return x @ params["last"]["kernel"]


def random_params(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = {"first": (8, 16), "middle": (16, 16), "last": (16, 1)}
    return {
        name: {"kernel": jax.random.normal(key, shape) * (2 / shape[0]) ** 0.5}
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


IMAGES = jax.random.normal(jax.random.key(2), (256, 8))
TARGETS = jnp.sin(forward(random_params(0), IMAGES))


def loss_fn(params):
    return jnp.mean((forward(params, IMAGES) - TARGETS) ** 2)


def train(optimizer, params, with_value=True):
    state = optimizer.init(params)

    def step(carry, _):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(cbp_jax.quantize(params, state))
        value = {"value": loss} if with_value else {}
        updates, state = optimizer.update(grads, state, params, **value)
        params = optax.apply_updates(params, updates)
        score = cbp_jax.constraint_failure_score(params, state, relative=True)
        return (params, state), (score, jnp.max(jnp.abs(grads["middle"]["kernel"])))

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, STEPS))
    (params, state), (violations, gradients) = run((params, state))
    return End(
        params,
        state,
        str(cbp_jax.layer_report(params, state)),
        violations,
        jnp.median(gradients),
        float(loss_fn(cbp_jax.quantize(params, state))),
        float(loss_fn(params)),
    )


@functools.cache
def pretrained():
    optimizer = optax.adam(1e-2)
    params = random_params(1)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss_fn)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, None, 1000))
    return run((params, optimizer.init(params)))[0][0]


def link(**changes):
    """`cbp` with the settings that the page starts from."""
    settings = {
        "steps_per_epoch": STEPS // 60,
        "patience": 1,
        "multiplier_learning_rate": 1e-3,
        "window_growth": lambda g: jnp.where(g < 10, g + 1, 1.5 * g),
    }
    return cbp_jax.cbp("binary", mask=MASK, **(settings | changes))


def sgd(rate):
    return optax.sgd(rate, momentum=0.9)


def cosine(rate=1e-2):
    return sgd(optax.cosine_decay_schedule(rate, STEPS))


@functools.cache
def closed():
    """The run that meets its constraint, beside those that do not."""
    end = train(optax.chain(link(), cosine()), pretrained())
    assert end.violation < 0.01
    return end


def largest_multiplier(end):
    (layer,) = cbp_jax.layer_report(end.params, end.state).layers
    return float(layer.multiplier_max)


def quoted(message):
    assert message in " ".join(PAGE.split())
    return message


def test_only_the_first_update():
    defaults = cbp_jax.cbp("binary", mask=MASK)
    end = train(optax.chain(defaults, cosine()), pretrained())
    assert quoted(FIRST_UPDATE) in end.report
    assert end.violation > 1
    assert FIRST_UPDATE not in closed().report


def test_no_finite_value():
    with pytest.warns(UserWarning, match="cbp's update got no value"):
        end = train(optax.chain(link(patience=2), cosine()), pretrained(), with_value=False)
    assert f"1,200 of 1,200 {quoted(NO_VALUE)}" in end.report
    quoted("cbp's update got no value")
    assert NO_VALUE not in closed().report


def test_multipliers_too_small():
    """Weights stay between levels because the loss pulls harder than the multipliers."""
    end = train(optax.chain(link(multiplier_learning_rate=1e-5), cosine()), pretrained())
    assert end.violation > 1
    assert largest_multiplier(end) < end.gradient
    assert largest_multiplier(closed()) > end.gradient


def test_multipliers_too_small_under_adamw():
    schedule = optax.cosine_decay_schedule(1e-2, STEPS)
    small, large = (
        train(
            optax.chain(link(multiplier_learning_rate=rate), optax.adamw(schedule)), pretrained()
        ).violation
        for rate in (1e-5, 1e-2)
    )
    assert small > 0.1
    assert large < 0.01


def test_window_too_slow():
    """Most weights are on levels; those near a midpoint are free until the rate is gone."""
    end = train(optax.chain(link(window_growth=None), cosine()), pretrained())
    assert end.violation > 0.05
    (layer,) = cbp_jax.layer_report(end.params, end.state).layers
    assert layer.on_level > 0.9
    weights = cbp_jax.relative_weights(end.params, end.state)["middle/kernel"]
    off = jnp.abs(jnp.abs(weights) - 1) > 0.5
    # The only midpoint of binary weights is 0, and the gap between the levels is 2.
    near_midpoint = jnp.abs(weights[off]) < 2 / cbp_jax.window(end.state)
    assert jnp.sum(near_midpoint) > off.sum() / 2 > 0
    assert closed().violation < end.violation / 5


def test_oscillation():
    """The violation has a minimum, from which it rises again, until the learning rate falls."""
    high = link(multiplier_learning_rate=0.1)
    end = train(optax.chain(high, sgd(1e-2)), pretrained())
    assert end.violation > 2 * float(jnp.min(end.violations[STEPS // 4 :]))
    assert end.violation > 0.1
    assert train(optax.chain(high, cosine()), pretrained()).violation < 1e-3
    assert train(optax.chain(link(), sgd(1e-2)), pretrained()).violation < 0.01


def test_learning_rate_too_small():
    end = train(optax.chain(link(), cosine(1e-5)), pretrained())
    assert abs(end.violation / float(end.violations[0]) - 1) < 0.1
    assert largest_multiplier(end) > 0.5 * largest_multiplier(closed())


def test_clipped_after_the_link():
    clip = optax.clip_by_global_norm(0.02)
    before = train(optax.chain(clip, link(), cosine()), pretrained())
    after = train(optax.chain(link(), clip, cosine()), pretrained())
    assert after.violation > 0.3
    assert before.violation < 0.01


def test_levels_beyond_the_bound():
    """`cbp_sgd` clamps at ±1; kernels whose scale is larger cannot reach their levels."""
    params = pretrained() | {"middle": {"kernel": 4 * pretrained()["middle"]["kernel"]}}
    params |= {"last": {"kernel": params["last"]["kernel"] / 4}}
    settings = {
        "steps_per_epoch": STEPS // 60,
        "patience": 1,
        "multiplier_learning_rate": 1e-2,
        "lr_decay": 0.5,
        "mask": MASK,
    }
    rate = optax.cosine_decay_schedule(3e-2, STEPS)
    end = train(cbp_jax.cbp_sgd(rate, "binary", **settings), params)
    assert float(end.state.cbp.weight_scale["middle"]["kernel"]) > 1
    (layer,) = cbp_jax.layer_report(end.params, end.state).layers
    assert layer.on_level == 0
    mended = train(cbp_jax.cbp_sgd(rate, "binary", weight_bound=None, **settings), params)
    (layer,) = cbp_jax.layer_report(mended.params, mended.state).layers
    assert layer.on_level > 0.9


def test_too_early():
    """Weights are held before the loss has moved them, and the loss ends higher."""
    rushed = train(optax.chain(link(multiplier_learning_rate=1.0), cosine()), pretrained())
    assert rushed.violation < 0.01
    assert rushed.quantized_loss > 1.5 * closed().quantized_loss


def test_latent_weights_without_a_quantizer():
    ste = train(optax.chain(cbp_jax.ste("binary", mask=MASK), cosine()), pretrained())
    assert ste.latent_loss > 3 * ste.quantized_loss
    assert closed().latent_loss == pytest.approx(closed().quantized_loss, rel=0.05)


def test_closing_with_too_many_steps():
    def closing(steps):
        return train(
            cbp_jax.closing(cosine(), "binary", total_steps=steps, mask=MASK), pretrained()
        )

    end = closing(10 * STEPS)
    assert "window 1.118 after 1,200 steps" in end.report
    assert end.violation > 1
    assert "window inf after 1,200 steps" in closing(STEPS).report
    assert closing(STEPS).violation == 0


def test_scale_of_nothing():
    """Under `jit`, `init` cannot raise; the report flags the layer."""
    flagged = quoted("scale 0 or not finite, so not constrained")
    zeros = pretrained() | {"middle": {"kernel": jnp.zeros((16, 16))}}
    with pytest.raises(ValueError, match=r"load the pre-trained weights before optimizer\.init"):
        link().init(zeros)
    state = jax.jit(link().init)(zeros)
    assert flagged in str(cbp_jax.layer_report(pretrained(), state))
    state = cbp_jax.refit_scales(pretrained(), state)
    assert flagged not in str(cbp_jax.layer_report(pretrained(), state))


def test_scale_of_other_weights():
    """Scales measured before the weights were loaded are not those of the weights."""
    early = link().init(jax.tree.map(lambda w: 3 * w, pretrained()))
    state = cbp_jax.refit_scales(pretrained(), early)
    scale = jnp.mean(jnp.abs(pretrained()["middle"]["kernel"]))
    assert early.weight_scale["middle"]["kernel"] == pytest.approx(3 * scale)
    assert state.weight_scale["middle"]["kernel"] == pytest.approx(scale)
