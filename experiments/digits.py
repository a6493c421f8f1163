"""CBP on handwritten digits: no data folder, no network connection, a few minutes on two cores.

Pre-trains a small convolutional network on scikit-learn's 8x8 digits in full precision; then, for each constraint, post-trains it
with CBP and, from the same start, with the straight-through estimator (STE) alone.

    python experiments/digits.py
    python experiments/digits.py --config.constraint=ternary --workdir=runs/digits_ternary
"""

import ml_collections
from common import data, post_training, settings
from common.models import SmallConvNet
from flax import nnx


def get_config() -> ml_collections.ConfigDict:
    config = settings.small_experiment()
    config.channels = 8
    config.batch_size = 32
    return config


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    model = SmallConvNet(num_classes=10, channels=config.channels, rngs=nnx.Rngs(config.seed))
    post_training.run("digits", config, workdir, data.load_digits(), model, SmallConvNet.constrained)


if __name__ == "__main__":
    settings.run_main(get_config(), "runs/digits", main)
