"""The config as a run uses it: settled once, at the start, and frozen."""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_collections

import cbp_jax
from common.config import ConfigError
from common.models.torch_weights import TORCHVISION_OPTIONS
from common.report.workdir import METHODS, read_metrics

RANDOM = "random"  # as `config.pretrained`
PRETRAINED = "pretrained"  # as `config.teacher`
# The position in the data is the step, and the schedule counts steps.
_FIXED = (
    "network", "phase", "constraint", "method", "seed", "batch_size", "data", "num_classes",
    "image_size", "color_jitter", "text", "context", "optimizer", "teacher", "distillation",
    "temperature", "validation_images", "normalization", "constrained", "multiplier_rule",
    "multiplier_dtype", "best_cfs", "scale_per_output", "scale_dtype",
)  # fmt: skip
# Where a run found its weights, data and hosts: nothing that a finished run depends on.
_PLACES = (
    "pretrained", "data_dir", "workers", "figures", "preflight", "keep_weights", "keep_best",
    "distributed", "coordinator", "num_processes", "process_id",
)  # fmt: skip
# Fields that count under some methods alone, and those that do in post-training alone.
_OF_METHODS = {
    "closes_at": ("closing",), "strength": ("closing",),
    "anneal_start": ("parq", "binary_relax"), "anneal_end": ("parq", "binary_relax"),
    "anneal_steepness": ("parq",),
    **dict.fromkeys(
        ("multiplier_learning_rate", "multiplier_rule", "multiplier_dtype", "patience",
         "window_factor", "lr_decay", "lr_decay_window"),
        ("cbp", "no_window"),
    ),
}  # fmt: skip
_OF_POST_TRAINING = (
    "method", "constraint", "constrained", "epochs", "learning_rate", "teacher", "distillation",
    "temperature", "scale_per_output", "scale_dtype",
)  # fmt: skip
_REMOVE = "remove it, and rerun with the config that the run had; its checkpoints are not touched"


def settle(
    config: ml_collections.ConfigDict, saved: Mapping[str, Any] | None = None
) -> ml_collections.FrozenConfigDict:
    """Checks a config, and fills in the fields that are None.

    Args:
      config: of `common.config`; it is unchanged.
      saved: `config.json` of a run that exists; None for a new one.

    Returns:
      The config to run, frozen.

    Raises:
      ConfigError: if a field makes no sense, or has no value.
      FileNotFoundError: if weights are to be post-trained and none are named.
    """
    settled = ml_collections.ConfigDict(config.to_dict())
    _check(settled)
    for name, values in settled.by_constraint.items():
        if settled[name] is None:
            settled[name] = values[settled.constraint]
    if settled.learning_rate is None:
        raise ConfigError("--config.learning_rate is None: give a number")
    if saved is None:
        _check_pretrained(settled)
        _check_teacher(settled)
        if "transform_input" in settled and settled.transform_input is None:
            settled.transform_input = _transform_input(settled)
    elif "transform_input" in settled:
        settled.transform_input = saved.get("transform_input")
    settled.normalization = settled.normalization or _normalization(settled, saved)
    return ml_collections.FrozenConfigDict(settled)


def saved_config(workdir: Path) -> dict[str, Any]:
    """Returns `config.json` of a run; empty if there is none.

    Raises:
      ConfigError: if it is damaged.
    """
    path = workdir / "config.json"
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {_REMOVE}") from error
    if not isinstance(saved, dict):
        raise ConfigError(f"{path} is damaged: it holds {type(saved).__name__}; {_REMOVE}")
    return saved


def differences(
    saved: Mapping[str, Any], config: ml_collections.FrozenConfigDict
) -> dict[str, str]:
    """Returns "saved -> asked" for each field that differs from `config.json`."""
    asked = json.loads(config.to_json_best_effort())
    return {
        name: f"{saved[name]} -> {value}"
        for name, value in asked.items()
        if name in saved and saved[name] != value
    }


def check_resumable(saved: Mapping[str, Any], config: ml_collections.FrozenConfigDict) -> str:
    """Returns a line on the fields that changed since the run began; empty if none did.

    Raises:
      ConfigError: if one of them cannot change; the error has a table of all that differ.
    """
    changed = differences(saved, config)
    if any(name in _FIXED for name in changed):
        rows = [("field", "saved", "asked", "may change")]
        for name, change in changed.items():
            before, after = change.split(" -> ", 1)
            may_change = "no" if name in _FIXED else "yes"
            rows.append((name, before or "''", after or "''", may_change))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        ]
        table = "\n  ".join(line.rstrip() for line in lines)
        raise ConfigError(
            f"the run in this workdir has another config:\n  {table}\n"
            "use the saved values where they may not change, or another --workdir"
        )
    return ", ".join(f"{name} {change}" for name, change in changed.items())


def differences_that_count(
    saved: Mapping[str, Any], config: ml_collections.FrozenConfigDict
) -> dict[str, str]:
    """Returns the `differences` that a finished run depends on, in its phase, under its method."""
    other = {name for name, methods in _OF_METHODS.items() if config.method not in methods}
    if config.phase == "pretrain":
        other |= {*_OF_METHODS, *_OF_POST_TRAINING}
    found = differences(saved, config)
    return {name: found[name] for name in found if name not in other and name not in _PLACES}


def is_finished(
    workdir: Path, step: int, saved: Mapping[str, Any], config: ml_collections.FrozenConfigDict
) -> bool:
    """Whether a workdir, whose newest checkpoint is of `step`, holds a config's finished run."""
    if differences_that_count(saved, config) or not (workdir / "summary.json").exists():
        return False
    return [row["step"] for row in read_metrics(workdir)[-1:]] == [step]


def is_constrained(config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict) -> bool:
    """Whether a run ends with weights on levels."""
    return config.phase == "post_train" and config.method != "full_precision"


def is_random(pretrained: str) -> bool:
    """Whether `config.pretrained` names no weights: pre-training needs none."""
    return pretrained in ("", RANDOM)


def is_torch_file(pretrained: str) -> bool:
    """Whether the weights come from a PyTorch file rather than from the workdir of a run."""
    return not is_random(pretrained) and not Path(pretrained).is_dir()


def _listed(choices: Collection[str]) -> str:
    return ", ".join(choice or "''" for choice in choices)


def _check(config: ml_collections.ConfigDict) -> None:
    for name, choices in {
        "phase": ("pretrain", "post_train"),
        "constraint": cbp_jax.CONSTRAINTS,
        "method": METHODS,
        "multiplier_rule": ("adam", "capped", "pi"),
        "optimizer": ("sgd", "adamw"),
        "schedule": ("", "constant", "cosine", "linear"),
        "normalization": ("", "cifar10", "imagenet"),
        "dtype": ("float32", "bfloat16", "float16"),
        "multiplier_dtype": ("float32", "bfloat16"),
        "scale_dtype": ("float32", "float16"),
    }.items():
        if config[name] not in choices:
            raise ConfigError(f"--config.{name}={config[name]!r} is none of {_listed(choices)}")
    for name in (
        "epochs",
        "pretrain_epochs",
        "batch_size",
        "checkpoint_epochs",
        "keep_checkpoints",
    ):
        if config[name] < 1:
            raise ConfigError(f"--config.{name}={config[name]} must be positive")
    for name, lowest, highest in (
        ("steps_per_epoch", 0, math.inf),  # 0: one pass
        ("checkpoint_steps", 0, math.inf),  # 0: none
        ("multiplier_learning_rate", 0, math.inf),
        ("validation_images", 0, math.inf),
        ("reestimate_batches", 0, math.inf),
        ("warmup_steps", 0, math.inf),
        ("clip_norm", 0, math.inf),
        ("b2", 0, 1),
        ("closes_at", 1e-6, 1),
        ("strength", 0, math.inf),
        ("best_cfs", 0, math.inf),
        ("anneal_steepness", 0.01, 100),  # where its sigmoid is computed without overflow
        ("distillation", 0, 1),
        ("temperature", 0.01, 1000),
    ):
        if not lowest <= config[name] <= highest:
            raise ConfigError(f"--config.{name}={config[name]} must be from {lowest} to {highest}")
    if config.window_factor and not 1 < config.window_factor < math.inf:
        raise ConfigError(
            f"--config.window_factor={config.window_factor} must be 0, for steps of 10, or above 1"
        )
    if not 0 <= config.anneal_start < config.anneal_end <= 1:
        raise ConfigError(
            f"--config.anneal_start={config.anneal_start} and anneal_end={config.anneal_end} are "
            "shares of the run: give 0 <= anneal_start < anneal_end <= 1"
        )


def _check_pretrained(config: ml_collections.ConfigDict) -> None:
    if config.phase == "post_train" and not config.pretrained:
        raise FileNotFoundError(
            "no weights to post-train: --config.pretrained is empty. Give "
            f"--config.pretrained=FILE, a .pth or .safetensors file of {config.network} from "
            "PyTorch, or the workdir of a run with --config.phase=pretrain. To post-train random "
            f"weights nevertheless, give --config.pretrained={RANDOM}"
        )
    if config.validation_images and not is_random(config.pretrained):
        trained = saved_config(Path(config.pretrained))
        held = trained.get("validation_images", 0)
        if trained.get("data") == config.data and held != config.validation_images:
            raise ConfigError(
                f"--config.validation_images={config.validation_images}, but {config.pretrained} "
                f"held out {held}, so it has seen others of them: pre-train with the same number"
            )


def _check_teacher(config: ml_collections.ConfigDict) -> None:
    wanted = config.phase == "post_train" and config.teacher == PRETRAINED
    if wanted and is_random(config.pretrained):
        raise ConfigError(
            f"--config.teacher={PRETRAINED}, but --config.pretrained={config.pretrained!r} names "
            "no weights: give a file or the workdir of a run"
        )


def _transform_input(config: ml_collections.ConfigDict) -> bool:
    """Whether the network normalises its input again: what its weights were trained with."""
    if is_torch_file(config.pretrained):
        return TORCHVISION_OPTIONS[config.network]["transform_input"]
    saved = {} if is_random(config.pretrained) else saved_config(Path(config.pretrained))
    return bool(saved.get("transform_input"))


def _normalization(config: ml_collections.ConfigDict, saved: Mapping[str, Any] | None) -> str:
    """How pixels of CIFAR-10 are normalised: as the network's weights were trained."""
    if config.data != "cifar10":
        return ""
    if saved is None and is_torch_file(config.pretrained):
        raise ConfigError(
            f"--config.normalization is empty, and {config.pretrained} does not say how its images "
            "were normalised: give imagenet (akamaster/pytorch_resnet_cifar10) or cifar10"
        )
    if saved is None:
        saved = {} if is_random(config.pretrained) else saved_config(Path(config.pretrained))
    return saved.get("normalization") or "cifar10"
