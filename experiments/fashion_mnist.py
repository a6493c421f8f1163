"""CBP on Fashion-MNIST: three narrow layers of binary, ternary or power-of-two weights.

Pre-trains a narrow MLP in full precision; then, for each constraint, post-trains it with CBP and,
from the same weights, with the straight-through estimator (STE) alone. TFDS and Grain read the data
set, as ArrayRecord.

    python experiments/fashion_mnist.py --config.data_dir=DIR
    TFDS_DATA_DIR=DIR python experiments/fashion_mnist.py --config.constraint=binary

Rerun the same command to resume.
"""

import ml_collections
from common import launch
from common.config import small_config


def get_config() -> ml_collections.ConfigDict:
    config = small_config("fashion_mnist", "small_mlp")
    config.width = 64  # narrow, so that low-bit weights cost something
    config.pretrain_epochs = 100
    return config


if __name__ == "__main__":
    launch.study(get_config())
