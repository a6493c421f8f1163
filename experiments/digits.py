"""CBP on handwritten digits: no data folder, no network connection, a few minutes on two cores.

Pre-trains a small convolutional network on scikit-learn's 8x8 digits in full precision; then, for
each constraint, post-trains it with CBP and, from the same start, with the straight-through
estimator (STE) alone.

    python experiments/digits.py
    python experiments/digits.py --config.constraint=ternary --workdir=runs/digits_ternary
"""

import ml_collections
from common import config as settings
from common import post_training
from common.input import in_memory as data
from common.models import SmallConvNet
from flax import nnx


def get_config() -> ml_collections.ConfigDict:
    config = settings.small_experiment()
    config.channels = 6  # narrow, so that low-bit weights cost something
    config.batch_size = 32
    config.steps_per_epoch = 50
    config.pretrain_epochs = 40
    # 8,000 steps with up to 3 epochs of 50 steps between two updates: 53 updates or more, enough to
    # close the window.
    config.epochs = 160
    config.patience = 3
    # The digits are soon learnt, and then nothing moves the last weights near a midpoint out of a
    # window that closes as 1/g. So it must close faster than in the paper.
    config.window_factor = 1.5
    # Weights travel about their own size in the time before the learning rate drops.
    config.learning_rate = 3e-2
    # Once constrained, a weight oscillates around its level with an amplitude of multiplier times
    # learning rate: small is better, as long as the multipliers outgrow the gradients of the loss,
    # which are tiny once the digits are learnt.
    config.multiplier_learning_rate = 3e-4
    return config


def make_dataset(config: ml_collections.ConfigDict) -> data.Dataset:
    del config  # it comes with scikit-learn
    return data.load_digits()


def make_model(config: ml_collections.ConfigDict) -> SmallConvNet:
    return SmallConvNet(num_classes=10, channels=config.channels, rngs=nnx.Rngs(config.seed))


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    post_training.run("digits", config, workdir, make_dataset(config), make_model(config))


if __name__ == "__main__":
    settings.run_main(get_config(), "runs/digits", main)
