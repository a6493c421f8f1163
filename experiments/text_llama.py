"""Methods of post-training on a small Llama that reads and writes bytes: a few hours on one core.

Pre-trains it on a text in full precision, by default on the sources of Python's standard library;
then post-trains it from the same weights with each method.

    python experiments/text_llama.py --config.text=FILE
    python experiments/text_llama.py --config.methods="('ste','cbp')" --config.constraint=binary

Rerun the same command to resume. `eval_loss` is in nats per byte: divided by ln 2, bits per byte.
"""

import ml_collections
from common import launch
from common.config import small_config


def get_config() -> ml_collections.ConfigDict:
    config = small_config("text_llama", "llama")
    config.constraint = "ternary"
    config.methods = ("full_precision", "rounding", "ste", "parq", "binary_relax", "cbp", "closing")
    config.data = "text"
    config.text = ""  # a file, or a folder of .txt and .py files; empty: the standard library
    config.num_classes = 256
    config.context = 128
    config.eval_windows = 512  # of the validation part, evenly spaced; 0: all
    config.width = 128
    config.depth = 4
    config.heads = 4
    config.kv_heads = 4
    config.hidden = 384
    config.batch_size = config.base_batch_size = 32
    config.eval_batch_size = 32
    config.steps_per_epoch = 25
    config.pretrain_epochs = 80
    config.epochs = 40
    config.optimizer = "adamw"
    config.schedule = "cosine"
    config.warmup_steps = 100
    config.clip_norm = 1.0
    config.b2 = 0.99
    config.weight_decay = 0.1
    config.pretrain_learning_rate = 2e-3
    config.learning_rate = 1e-3
    config.multiplier_learning_rate = 3e-3  # not tuned
    config.patience = 1
    return config


if __name__ == "__main__":
    launch.study(get_config())
