"""A Llama that reads and writes bytes, with ternary and binary weights: an hour on two CPU cores.

Pre-trains it on a text, by default the sources of Python's standard library; then goes on from the
same weights in full precision, and with each method of post-training under each constraint, with
and without the full-precision network as a teacher.

    python experiments/shakespeare_llama.py --config.text=FILE
    python experiments/shakespeare_llama.py --config.text=FILE --config.preset=gpu
    python experiments/export.py --workdir=runs/shakespeare_llama/ternary_ste_distilled \\
        --format=gguf

Rerun the same command to resume. `eval_loss` is in nats per byte: divided by ln 2, bits per byte.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import ml_collections
from common import launch
from common.config import ConfigError, small_config

# What `--config.preset` stands for; fields that the command line sets are left as they are.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "": {},
        "gpu": {
            "width": 768, "depth": 8, "heads": 12, "kv_heads": 4, "hidden": 2048, "context": 256,
            "batch_size": 64, "base_batch_size": 64, "eval_batch_size": 64, "steps_per_epoch": 100,
            "pretrain_epochs": 50, "epochs": 20, "pretrain_learning_rate": 1e-3,
            "dtype": "bfloat16",
        },
    }
)  # fmt: skip


def get_config() -> ml_collections.ConfigDict:
    config = small_config("shakespeare_llama", "llama")
    config.preset = ""  # or gpu: 50 million weights, for one accelerator
    config.constraint = "ternary"
    config.constraints = ("ternary", "binary")  # of the study
    config.methods = ("full_precision", "ste", "closing", "cbp")
    config.distilled = True  # each method once more, with the pre-trained weights as its teacher
    config.distillation, config.temperature = 0.9, 1.0
    config.data = "text"
    config.text = ""  # a file, or a folder of .txt and .py files; empty: the standard library
    config.num_classes = 256
    config.context = 128
    config.eval_windows = 256  # of the validation part, evenly spaced; 0: all
    # Rows of a multiple of 256 inputs are what GGUF's ternary types hold.
    config.width = 256
    config.depth = 2
    config.heads = 4
    config.kv_heads = 2
    config.hidden = 768
    config.batch_size = config.base_batch_size = 16
    config.eval_batch_size = 32
    config.steps_per_epoch = 25
    config.pretrain_epochs = 80
    config.epochs = 16
    config.optimizer = "adamw"
    config.schedule = "cosine"
    config.warmup_steps = 100
    config.clip_norm = 1.0
    config.b2 = 0.99
    config.weight_decay = 0.1
    config.pretrain_learning_rate = 2e-3
    config.learning_rate = 1e-3
    config.multiplier_learning_rate = 1e-3
    config.patience = 1
    config.scale_per_output = True  # GGUF repeats a scale for every 128 or 256 weights anyway
    config.scale_dtype = "float16"
    config.figures = False
    return config


def with_preset(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns a config with the fields of its preset, but for those that are not the usual ones."""
    if config.preset not in PRESETS:
        known = ", ".join(name or "''" for name in PRESETS)
        raise ConfigError(f"--config.preset={config.preset!r} is none of {known}")
    usual, found = get_config(), ml_collections.ConfigDict(config.to_dict())
    for name, value in PRESETS[config.preset].items():
        if config[name] == usual[name]:
            found[name] = value
    return found


if __name__ == "__main__":
    launch.study(get_config(), with_preset)
