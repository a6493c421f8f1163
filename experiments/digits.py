"""CBP on handwritten digits: no download, a few minutes on two cores.

Pre-trains a small convolutional network on scikit-learn's 8x8 digits in full precision; then, for
each constraint, post-trains it with CBP and, from the same weights, with the straight-through
estimator (STE) alone.

    python experiments/digits.py
    python experiments/digits.py --config.constraint=ternary --workdir=runs/digits_ternary

Rerun the same command to resume.
"""

import ml_collections
from common import launch
from common.config import small_config


def get_config() -> ml_collections.ConfigDict:
    config = small_config("digits", "small_conv")
    config.channels = 6  # narrow, so that low-bit weights cost something
    config.batch_size = config.base_batch_size = 32
    config.steps_per_epoch = 50
    config.pretrain_epochs = 40
    # 8,000 steps, at most 3 epochs of 50 steps between two updates: at least 53 updates, enough to
    # close the window.
    config.epochs = 160
    config.patience = 3
    # The digits are soon learnt, and then gradients vanish: nothing moves the last weights near a
    # midpoint out of a window that closes as 1/g. So it must close faster than in the paper.
    config.window_factor = 1.5
    # Weights travel about their own size before the learning rate drops.
    config.learning_rate = 3e-2
    # Once constrained, a weight oscillates around its level by multiplier times learning rate: a
    # small rate is better, if the multipliers outgrow the loss's gradients, which are tiny here.
    config.multiplier_learning_rate = 3e-4
    return config


if __name__ == "__main__":
    launch.study(get_config())
