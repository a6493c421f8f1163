"""CBP on Fashion-MNIST: three narrow layers of binary, ternary or power-of-two weights.

Pre-trains a narrow MLP in full precision; then, for each constraint, post-trains it with CBP and,
from the same start, with the straight-through estimator (STE) alone. The data set is read by TFDS
and Grain, as ArrayRecord.

    python experiments/fashion_mnist.py --config.data_dir=DIR
    TFDS_DATA_DIR=DIR python experiments/fashion_mnist.py --config.constraint=binary
"""

import sys

import ml_collections
from common import config as settings
from common import post_training
from common.input import in_memory as data
from common.models import SmallMLP
from flax import nnx


def get_config() -> ml_collections.ConfigDict:
    config = settings.small_experiment()
    config.data_dir = ""  # empty: TFDS_DATA_DIR, or the default of TFDS
    config.width = 64  # narrow, so that low-bit weights cost something
    config.pretrain_epochs = 100
    return config


def make_dataset(config: ml_collections.ConfigDict) -> data.Dataset:
    return data.load_tfds("fashion_mnist", config.data_dir or None)


def make_model(config: ml_collections.ConfigDict) -> SmallMLP:
    return SmallMLP(
        num_classes=10, features_in=28 * 28, width=config.width, rngs=nnx.Rngs(config.seed)
    )


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    try:
        dataset = make_dataset(config)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    post_training.run("fashion_mnist", config, workdir, dataset, make_model(config))


if __name__ == "__main__":
    settings.run_main(get_config(), "runs/fashion_mnist", main)
