"""The paper's settings, and what is made of them: learning rates, optimizers, augmentation, the memory check."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("ml_collections", reason='needs the extra: pip install -e ".[test]"')

import cifar10_resnet18
import cifar10_resnet20
import imagenet_alexnet
import imagenet_googlenet
import imagenet_resnet18
import imagenet_resnet50
from common import config as settings
from common import models
from common.training import optimizers, preflight
from common.training import setup as networks

import cbp_jax

MODULES = {
    "alexnet": imagenet_alexnet,
    "googlenet": imagenet_googlenet,
    "resnet18": imagenet_resnet18,
    "resnet50": imagenet_resnet50,
}
CONSTRAINTS = ("binary", "ternary", "one_bit_shift", "two_bit_shift")
# Kim and Jeong (2021): top-1 by constraint, and full precision.
PAPER = {
    "alexnet": ("58.0", "58.8", "60.8", "60.9", "60.0"),
    "resnet18": ("66.6", "68.9", "69.4", "69.4", "69.6"),
    "resnet50": ("74.4", "75.0", "76.0", "75.9", "76.0"),
}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("network", MODULES)
def test_the_papers_settings(network, constraint):
    config = MODULES[network].CONFIGS[constraint]()
    shift = constraint.endswith("shift")
    assert (config.network, config.constraint, config.phase, config.method) == (
        network,
        constraint,
        "post_train",
        "cbp",
    )
    assert config.batch_size == config.base_batch_size == (128 if network == "resnet50" else 256)
    assert config.learning_rate == (1e-4 if shift and network in ("alexnet", "resnet50") else 1e-3)
    assert config.weight_decay == (5e-4 if network == "alexnet" else 1e-4)
    assert (config.patience, config.lr_decay, config.lr_decay_window, config.window_factor) == (
        20,
        0.1,
        20,
        0,
    )
    assert (config.multiplier_learning_rate, config.image_size, config.resize) == (1e-4, 224, 256)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("network", MODULES)
def test_docstrings_are_the_command_and_the_papers_number(network, constraint):
    function = MODULES[network].CONFIGS[constraint]
    command, _, result = (line.strip() for line in function.__doc__.strip().splitlines())
    assert command.startswith(f"python experiments/imagenet_{network}.py ")
    chosen = settings.choose(MODULES[network].CONFIGS, command.split())
    assert chosen.to_dict() == function().to_dict()
    assert all(name in chosen for name in re.findall(r"--config\.(\w+)=", command))
    if network in PAPER:
        number, full_precision = PAPER[network][CONSTRAINTS.index(constraint)], PAPER[network][-1]
        assert re.match(
            rf"Paper: {number} / [\d.]+ \(full precision {full_precision} / [\d.]+\)\.", result
        )


def test_the_command_line_chooses_the_config():
    configs = imagenet_resnet50.CONFIGS
    assert settings.choose(configs, ["x.py"]).constraint == "binary"
    assert (
        settings.choose(
            configs, ["x.py", "--config.constraint", "ternary", "--workdir=y"]
        ).constraint
        == "ternary"
    )
    assert (
        settings.choose(
            configs, ["x.py", "--config.constraint=ternary", "-config.constraint=two_bit_shift"]
        ).learning_rate
        == 1e-4
    )
    with pytest.raises(SystemExit, match="quaternary is none of binary, ternary"):
        settings.choose(configs, ["x.py", "--config.constraint=quaternary"])


@pytest.mark.parametrize("module", [cifar10_resnet18, cifar10_resnet20])
def test_cifar_networks_exist(module):
    config = module.get_config()
    assert config.network in models.NETWORKS
    assert (config.data, config.num_classes) == ("cifar10", 10)


def test_learning_rate_of_the_papers_batch_is_constant():
    config = imagenet_resnet18.binary()
    schedule = optimizers.learning_rate(config, steps_per_epoch=10)
    assert {float(schedule(step)) for step in (0, 1, 1999, 5000)} == {1e-3}


def test_learning_rate_of_a_larger_batch_is_scaled_and_warmed_up():
    config = imagenet_resnet50.ternary()
    config.batch_size = 1024  # 8 times the paper's
    schedule = optimizers.learning_rate(config, steps_per_epoch=10)
    assert [float(schedule(step)) for step in (0, 25, 50, 400)] == pytest.approx(
        [0, 4e-3, 8e-3, 8e-3]
    )


def test_learning_rate_of_pretraining_falls_along_a_cosine():
    config = imagenet_alexnet.binary()
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
    config = imagenet_resnet18.binary()
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
    assert np.all(
        np.asarray(no_window.cbp.multipliers["kernel"]) > 0
    )  # every weight off its level is constrained at once
    free = np.asarray(cbp.cbp.multipliers["kernel"])
    assert (free == 0).any()  # those near the midpoint are not yet
    assert (free > 0).any()
    assert not np.asarray(ste.cbp.multipliers["kernel"]).any()
    with pytest.raises(ValueError, match="none of cbp, no_window, ste"):
        steps_of("lagrange")


def test_rules_of_the_multipliers():
    """On violations of 1e-3 and 0.5: Adam's first step is the rate for both, the capped rule's a third of it and the rate."""
    config = imagenet_resnet18.binary()
    violation = jnp.array([1e-3, 0.5])
    for rule, expected in {"adam": [1e-4, 1e-4], "capped": [1e-4 / 3, 1e-4]}.items():
        config.multiplier_rule, config.multiplier_dtype = rule, "bfloat16"
        options = optimizers.multiplier_options(config)
        optimizer = options["multiplier_optimizer"]
        updates, state = optimizer.update(-violation, optimizer.init(violation))
        np.testing.assert_allclose(updates, expected, rtol=1e-4)
        assert options["multiplier_dtype"] == "bfloat16"
        assert any(leaf.ndim for leaf in jax.tree.leaves(state)) == (rule == "adam")
    config.multiplier_rule = "lion"
    with pytest.raises(ValueError, match="none of adam, capped"):
        optimizers.multiplier_options(config)


def test_memory_is_checked_before_the_first_step():
    assert (
        preflight.check_memory(2**30, 4 * 2**30)
        == "the step needs 1.00 GiB on each device, 4.00 GiB are there"
    )
    with pytest.raises(
        MemoryError, match=r"needs 4\.00 GiB .* lower --config\.batch_size, .* --config\.fsdp"
    ):
        preflight.check_memory(4 * 2**30, 4 * 2**30)
    assert preflight.memory_there() > 2**20
    compiled = (
        jax.jit(lambda x, y: (x + y, y), donate_argnums=0)
        .lower(jnp.zeros(2**20), jnp.zeros(2**20))
        .compile()
    )
    # two arguments and two results of 4 MiB, one of which takes the place of the donated argument
    assert preflight.memory_needed(compiled) == pytest.approx(3 * 2**22, rel=0.01)


def test_where_weights_come_from(tmp_path):
    assert networks.is_torch_file("resnet50.pth")
    assert networks.is_torch_file(str(tmp_path / "weights.safetensors"))
    assert not networks.is_torch_file(str(tmp_path))
    assert not networks.is_torch_file("")
    assert not networks.is_torch_file("random")
    assert networks.is_random("random")
    assert networks.is_random("")  # of a run that resumes
    assert not networks.is_random("./random")  # a folder of that name
    assert networks.saved_config(tmp_path) == {}
