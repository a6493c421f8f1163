"""The configs of the experiments: the paper's settings, and what settling makes of a config."""

import json
import sys

import cifar10_resnet18
import cifar10_resnet20
import imagenet_alexnet
import imagenet_googlenet
import imagenet_resnet18
import imagenet_resnet50
import ml_collections
import pytest
from absl import flags
from common import models
from common.config import ConfigError
from common.training.settle import (
    check_resumable,
    differences_that_count,
    is_constrained,
    is_random,
    is_torch_file,
    saved_config,
    settle,
)
from ml_collections import config_flags
from run_support import digits_config

import cbp_jax

MODULES = {
    "alexnet": imagenet_alexnet,
    "googlenet": imagenet_googlenet,
    "resnet18": imagenet_resnet18,
    "resnet50": imagenet_resnet50,
}


@pytest.mark.parametrize("constraint", cbp_jax.CONSTRAINTS)
@pytest.mark.parametrize("network", MODULES)
def test_the_papers_settings(network, constraint):
    asked = MODULES[network].get_config()
    asked.constraint, asked.pretrained = constraint, "weights.pth"
    config, shift = settle(asked), constraint.endswith("shift")
    assert (config.experiment, config.network) == (f"imagenet_{network}", network)
    assert (config.phase, config.method, config.data) == ("post_train", "cbp", "tfds")
    assert config.batch_size == config.base_batch_size == (128 if network == "resnet50" else 256)
    assert config.learning_rate == (1e-4 if shift and network in ("alexnet", "resnet50") else 1e-3)
    assert config.weight_decay == (5e-4 if network == "alexnet" else 1e-4)
    assert (config.patience, config.lr_decay, config.lr_decay_window) == (20, 0.1, 20)
    assert (config.multiplier_learning_rate, config.window_factor) == (1e-4, 0)
    assert (config.image_size, config.resize) == (224, 256)


@pytest.mark.parametrize("module", [cifar10_resnet18, cifar10_resnet20])
def test_cifar_networks_exist(module):
    config = module.get_config()
    assert config.network in models.NETWORKS
    assert (config.data, config.num_classes) == ("cifar10", 10)


@pytest.mark.parametrize(("given", "rate"), [([], 1e-4), (["--config.learning_rate=0.5"], 0.5)])
def test_a_rate_on_the_command_line_takes_precedence(monkeypatch, given, rate):
    arguments = ["--config.constraint=two_bit_shift", "--config.pretrained=random", *given]
    monkeypatch.setattr(sys, "argv", ["x.py", *arguments])
    values = flags.FlagValues()
    config = imagenet_alexnet.get_config()
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values)
    values(sys.argv)
    assert settle(holder.value).learning_rate == rate


def test_a_settled_config_is_frozen_and_the_callers_unchanged():
    config = imagenet_resnet50.get_config()
    config.pretrained = "random"
    settled = settle(config)
    assert config.learning_rate is None
    with pytest.raises(AttributeError):
        settled.learning_rate = 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "train"}, "phase='train' is none of pretrain, post_train"),
        ({"method": "magic"}, "method='magic' is none of cbp, "),
        ({"constraint": "quaternary"}, "constraint='quaternary' is none of binary, ternary"),
        ({"multiplier_rule": "lion"}, "multiplier_rule='lion' is none of adam, capped"),
        ({"normalization": "none"}, "normalization='none' is none of '', cifar10"),
        ({"validation_images": -1}, "validation_images=-1 must be from 0"),
        ({"reestimate_batches": -1}, "reestimate_batches=-1 must be from 0"),
        ({"epochs": 0}, "epochs=0 must be positive"),
        ({"dtype": "int32"}, "dtype='int32' is none of float32, bfloat16, float16"),
        ({"multiplier_dtype": "float16"}, "multiplier_dtype='float16' is none of float32, bf"),
        ({"best_cfs": -0.1}, "best_cfs=-0.1 must be from 0"),
        ({"optimizer": "lion"}, "optimizer='lion' is none of sgd, adamw"),
        ({"schedule": "step"}, "schedule='step' is none of '', constant, cosine, linear"),
        ({"distillation": 1.5}, "distillation=1.5 must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be from 0.01 to 1000"),
        ({"anneal_start": 0.9}, "anneal_start=0.9 and anneal_end=0.8 are shares of the run"),
        ({"teacher": "pretrained"}, "teacher=pretrained, but --config.pretrained='random' names"),
        ({"learning_rate": None}, "learning_rate is None"),
    ],
)
def test_a_field_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        settle(ml_collections.ConfigDict({**digits_config().to_dict(), **changes}))


def test_no_weights_to_post_train():
    message = (
        r"no weights to post-train.*--config.pretrained=FILE.*small_conv.*phase=pretrain.*"
        r"--config.pretrained=random"
    )
    with pytest.raises(FileNotFoundError, match=message):
        settle(digits_config(pretrained=""))
    settle(digits_config(pretrained="", phase="pretrain"))


def test_how_googlenet_normalises_its_input(tmp_path):
    """As its weights were trained: torchvision's file, a run, random weights, or the user says."""
    config = imagenet_googlenet.get_config()
    for pretrained, expected in (("googlenet.pth", True), ("random", False)):
        config.pretrained = pretrained
        assert settle(config).transform_input is expected
    (tmp_path / "config.json").write_text('{"transform_input": true}')
    config.pretrained = str(tmp_path)
    assert settle(config).transform_input is True
    assert (
        settle(config, saved={"transform_input": False}).transform_input is False
    )  # a resumed run
    config.pretrained, config.transform_input = "googlenet.pth", False
    assert settle(config).transform_input is False


def test_how_cifar10_is_normalised(tmp_path):
    """As the weights were trained: those of a run say it, and for a PyTorch file the user does."""
    config = cifar10_resnet20.get_config()
    (tmp_path / "config.json").write_text('{"normalization": "imagenet"}')
    for pretrained, expected in (("random", "cifar10"), (str(tmp_path), "imagenet")):
        config.pretrained = pretrained
        assert settle(config).normalization == expected
    assert settle(config, saved={"normalization": "cifar10"}).normalization == "cifar10"
    assert settle(config, saved={}).normalization == "cifar10"  # a run from before the field
    config.pretrained = "resnet20.th"
    with pytest.raises(ConfigError, match=r"resnet20\.th does not say how.*give imagenet"):
        settle(config)
    config.normalization = "imagenet"
    assert settle(config).normalization == "imagenet"
    assert settle(digits_config()).normalization == ""


def test_pretrained_weights_have_not_seen_the_validation_images(tmp_path):
    (tmp_path / "config.json").write_text('{"data": "digits", "validation_images": 50}')
    settle(digits_config(pretrained=str(tmp_path), validation_images=50))
    with pytest.raises(ConfigError, match=r"validation_images=60, but .* held out 50"):
        settle(digits_config(pretrained=str(tmp_path), validation_images=60))
    (tmp_path / "config.json").write_text('{"data": "digits"}')  # from before the field
    with pytest.raises(ConfigError, match="held out 0"):
        settle(digits_config(pretrained=str(tmp_path), validation_images=60))


def test_what_may_change_on_resume():
    config = settle(digits_config())
    saved = json.loads(config.to_json_best_effort())
    assert check_resumable(saved, config) == ""
    assert check_resumable(saved, settle(digits_config(epochs=9))) == "epochs 3 -> 9"
    other = {"workers": 1, "fsdp": 2, "num_processes": 2, "keep_best": False, "learning_rate": 0.1}
    assert check_resumable(saved, settle(digits_config(**other))).count("->") == len(other)
    for fixed in ({"batch_size": 64}, {"multiplier_dtype": "bfloat16"}, {"best_cfs": 0.5}):
        ((name, value),) = fixed.items()
        with pytest.raises(ValueError, match=rf"\n  {name} +\S+ +{value} +no\n"):
            check_resumable(saved, settle(digits_config(**fixed)))
    message = (
        r"(?s)field +saved +asked +may change\n"
        r" +constraint +ternary +binary +no\n +epochs +3 +9 +yes\n +seed +0 +5 +no\nuse the saved"
    )
    with pytest.raises(ValueError, match=message):
        check_resumable(saved, settle(digits_config(seed=5, constraint="binary", epochs=9)))
    with pytest.raises(
        ValueError, match=r"optimizer +sgd +adamw +no\n +teacher +'' +elsewhere +no"
    ):
        check_resumable(saved, settle(digits_config(optimizer="adamw", teacher="elsewhere")))


def test_where_weights_end_on_levels():
    assert is_constrained(settle(digits_config(method="rounding")))
    assert not is_constrained(settle(digits_config(method="full_precision")))
    assert not is_constrained(settle(digits_config(phase="pretrain")))


def test_where_weights_come_from(tmp_path):
    assert is_torch_file("resnet50.pth")
    assert is_torch_file(str(tmp_path / "weights.safetensors"))
    assert not any(map(is_torch_file, (str(tmp_path), "", "random")))
    assert is_random("random")
    assert is_random("")  # pre-training
    assert not is_random("./random")  # a folder of that name
    assert saved_config(tmp_path) == {}


def test_what_a_finished_run_depends_on():
    saved = json.loads(settle(digits_config(method="ste")).to_json_best_effort())

    def counts(**changes):
        return differences_that_count(saved, settle(digits_config(**{"method": "ste", **changes})))

    assert counts(keep_best=False) == {}
    assert counts(closes_at=0.5, anneal_end=0.7, patience=9, workers=0, data_dir="elsewhere") == {}
    assert set(counts(learning_rate=0.5, patience=9)) == {"learning_rate"}
    assert set(counts(method="closing", closes_at=0.5)) == {"method", "closes_at"}
    pretrained = json.loads(settle(digits_config(phase="pretrain")).to_json_best_effort())
    other = settle(digits_config(phase="pretrain", constraint="binary", closes_at=0.5, epochs=9))
    assert differences_that_count(pretrained, other) == {}
    other = settle(digits_config(phase="pretrain", pretrain_learning_rate=0.5))
    assert set(differences_that_count(pretrained, other)) == {"pretrain_learning_rate"}


@pytest.mark.parametrize(
    "field",
    [{"keep_checkpoints": 0}, {"keep_checkpoints": -1}, {"steps_per_epoch": -1},
     {"checkpoint_steps": -2}, {"multiplier_learning_rate": -1.0}, {"window_factor": 0.5},
     {"window_factor": -2.0}, {"window_factor": float("nan")}],
)  # fmt: skip
def test_numbers_that_make_no_sense(field):
    with pytest.raises(ConfigError, match=f"--config.{next(iter(field))}="):
        settle(digits_config(**field))
