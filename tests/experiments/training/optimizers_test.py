"""The optimizers of a run: learning rates by step, the methods, the rules of the multipliers."""

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

import cbp_jax


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


def steps_of(method, count=3):
    """A few steps on a quadratic loss under one of the three methods."""
    config = config_of(imagenet_resnet18)
    config.update(
        {
            "method": method,
            "epochs": 10,
            "patience": 1,
            "learning_rate": 1e-2,
            "multiplier_learning_rate": 1e-2,
        }
    )
    optimizer = optimizers.post_training(config, 1, "kernel")
    params = {"kernel": jnp.array([[0.9, -0.3], [0.1, -0.8]]), "bias": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(count):
        updates, state = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), state, params, value=jnp.ones(())
        )
        params = jax.tree.map(jnp.add, params, updates)
    return params, state


def test_methods_of_the_ablation():
    _, cbp = steps_of("cbp")
    _, no_window = steps_of("no_window")
    _, ste = steps_of("ste")
    assert float(cbp_jax.window(cbp)) == 3
    assert float(cbp_jax.window(no_window)) == np.inf
    # Every weight off its level is constrained at once.
    assert np.all(np.asarray(no_window.cbp.multipliers["kernel"]) > 0)
    free = np.asarray(cbp.cbp.multipliers["kernel"])
    assert (free == 0).any()  # those near the midpoint are not yet
    assert (free > 0).any()
    assert not np.asarray(ste.cbp.multipliers["kernel"]).any()


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
