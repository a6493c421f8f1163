"""The parts of a run's optimizer: learning rates by step, AdamW, the rules of the multipliers."""

import imagenet_alexnet
import imagenet_resnet18
import imagenet_resnet50
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from common.training import optimizers
from common.training.settle import settle


def config_of(module):
    """The settled config, open to changes."""
    config = module.get_config()
    config.pretrained = "random"
    return ml_collections.ConfigDict(settle(config).to_dict())


def test_learning_rate_of_the_papers_batch_is_constant():
    config = config_of(imagenet_resnet18)
    schedule = optimizers.learning_rate(config, steps_per_epoch=10)
    assert {float(schedule(step)) for step in (0, 1, 1999, 5000)} == {1e-3}


def test_learning_rate_of_a_larger_batch_is_scaled_and_warmed_up():
    config = config_of(imagenet_resnet50)
    config.batch_size = 1024  # 8 times the paper's
    schedule = optimizers.learning_rate(config, steps_per_epoch=10)
    assert [float(schedule(step)) for step in (0, 25, 50, 400)] == pytest.approx(
        [0, 4e-3, 8e-3, 8e-3]
    )


def test_learning_rate_of_pretraining_falls_along_a_cosine():
    config = config_of(imagenet_alexnet)
    config.phase = "pretrain"
    schedule = optimizers.learning_rate(config, steps_per_epoch=10)
    peak, warmup, total = config.pretrain_learning_rate, 50, 900
    for step in (0, 10, 50, 475, 899, 900):
        expected = peak * (
            step / warmup
            if step < warmup
            else (1 + np.cos(np.pi * (step - warmup) / (total - warmup))) / 2
        )
        assert float(schedule(step)) == pytest.approx(expected, abs=1e-8)


def test_rules_of_the_multipliers():
    """On violations of 1e-3 and 0.5: Adam's first step is the rate, the capped rule's a third of it
    and the rate."""
    config = config_of(imagenet_resnet18)
    violation = jnp.array([1e-3, 0.5])
    for rule, expected in {"adam": [1e-4, 1e-4], "capped": [1e-4 / 3, 1e-4]}.items():
        config.multiplier_rule, config.multiplier_dtype = rule, "bfloat16"
        options = optimizers.multiplier_options(config)
        optimizer = options["multiplier_optimizer"]
        updates, state = optimizer.update(-violation, optimizer.init(violation))
        np.testing.assert_allclose(updates, expected, rtol=1e-4)
        assert options["multiplier_dtype"] == "bfloat16"
        assert any(leaf.ndim for leaf in jax.tree.leaves(state)) == (rule == "adam")


def test_proportional_integral_rule():
    """Multipliers are the sum of the violations, and three times the last, in units of the rate."""
    config = config_of(imagenet_resnet18)
    config.multiplier_rule = "pi"
    optimizer = optimizers.multiplier_options(config)["multiplier_optimizer"]
    violations, multiplier = jnp.array([0.3, 0.1, 0.02]), 0.0
    state = optimizer.init(violations[0])
    for violation in violations:
        update, state = optimizer.update(-violation, state)
        multiplier += update
    expected = config.multiplier_learning_rate / 3e-3 * (0.42 + 3 * 0.02)
    assert float(multiplier) == pytest.approx(expected, rel=1e-5)


def test_pretraining_keeps_the_rate_it_applied():
    """For the log, in the optimizer's state; and the rate is the schedule's, to the bit."""
    config = config_of(imagenet_alexnet)
    config.phase, config.weight_decay = "pretrain", 0.0
    optimizer, schedule = optimizers.pretraining(config, 10), optimizers.learning_rate(config, 10)
    params = {"kernel": jnp.ones((2, 2))}
    state = optimizer.init(params)
    for step in range(3):
        updates, state = optimizer.update({"kernel": jnp.ones((2, 2))}, state, params)
        momentum = sum(0.9**power for power in range(step + 1))
        np.testing.assert_allclose(updates["kernel"], -momentum * schedule(step), rtol=1e-6)
        assert state[1].hyperparams["learning_rate"] == schedule(step)


@pytest.mark.parametrize("phase", ["pretrain", "post_train"])
def test_a_named_schedule_and_its_warm_up(phase):
    config = config_of(imagenet_alexnet)
    config.phase, config.warmup_steps, config.epochs, config.pretrain_epochs = phase, 4, 2, 2
    config.learning_rate = config.pretrain_learning_rate = 0.5
    for name, shape in {
        "constant": lambda x: 1.0,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    }.items():
        config.schedule = name
        schedule = optimizers.learning_rate(config, steps_per_epoch=10)
        expected = [0.5 * (t / 4 if t < 4 else shape((t - 4) / 16)) for t in range(21)]
        assert [float(schedule(t)) for t in range(21)] == pytest.approx(expected, abs=1e-7)


def test_adamw_by_its_definition():
    """Two steps: moments, decoupled decay of the kernel alone, and the clipped global norm."""
    config = config_of(imagenet_resnet18)
    config.update(
        {
            "phase": "pretrain",
            "optimizer": "adamw",
            "b2": 0.9,
            "weight_decay": 0.1,
            "clip_norm": 1.0,
            "schedule": "linear",
            "warmup_epochs": 0,
            "pretrain_epochs": 1,
            "pretrain_learning_rate": 0.1,
        }
    )
    optimizer = optimizers.pretraining(config, 10)
    params = {"kernel": jnp.array([[1.0, -2.0]]), "bias": jnp.array([0.5])}
    grads = {"kernel": jnp.array([[3.0, 0.3]]), "bias": jnp.array([4.0])}
    state, expected = optimizer.init(params), jax.tree.map(np.float64, params)
    norm = np.sqrt(3**2 + 0.3**2 + 4**2)
    mean, square = (jax.tree.map(lambda w: 0 * np.float64(w), params) for _ in range(2))
    for step in (1, 2):
        updates, state = optimizer.update(grads, state, params, value=jnp.ones(()))
        params = jax.tree.map(jnp.add, params, updates)
        rate = 0.1 * (1 - (step - 1) / 10)
        for name, decay in (("kernel", 0.1), ("bias", 0.0)):
            g = np.float64(grads[name]) / norm
            mean[name] = 0.9 * mean[name] + 0.1 * g
            square[name] = 0.9 * square[name] + 0.1 * g * g
            moved = mean[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.9**step)) + 1e-8)
            expected[name] = expected[name] - rate * (moved + decay * expected[name])
            np.testing.assert_allclose(params[name], expected[name], rtol=1e-5)
