"""The paper's AlexNet with batch normalization on ImageNet: from pre-trained weights to binary,
ternary or power-of-two ones.

No public file of this network exists, so pre-train it first (the authors' own .pth is taken too):

    python experiments/imagenet_alexnet.py --config.phase=pretrain --workdir=runs/alexnet

    python experiments/imagenet_alexnet.py --config.constraint=binary \\
        --config.pretrained=runs/alexnet --workdir=runs/alexnet_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. The same command
resumes a stopped run. The accuracies below are the paper's, top-1 / top-5; this repository has not
reproduced them: that takes ImageNet and days of an accelerator.
"""

import sys

import ml_collections
from common import config as settings


def binary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_alexnet.py --config.pretrained=runs/alexnet
    --config.constraint=binary

    Paper: 58.0 / 80.6 (full precision 60.0 / 82.4).
    """
    return _config("binary", learning_rate=1e-3)


def ternary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_alexnet.py --config.pretrained=runs/alexnet
    --config.constraint=ternary

    Paper: 58.8 / 81.2 (full precision 60.0 / 82.4).
    """
    return _config("ternary", learning_rate=1e-3)


def one_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_alexnet.py --config.pretrained=runs/alexnet
    --config.constraint=one_bit_shift

    Paper: 60.8 / 82.6 (full precision 60.0 / 82.4).
    """
    return _config("one_bit_shift", learning_rate=1e-4)


def two_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_alexnet.py --config.pretrained=runs/alexnet
    --config.constraint=two_bit_shift

    Paper: 60.9 / 82.8 (full precision 60.0 / 82.4).
    """
    return _config("two_bit_shift", learning_rate=1e-4)


CONFIGS = {
    "binary": binary,
    "ternary": ternary,
    "one_bit_shift": one_bit_shift,
    "two_bit_shift": two_bit_shift,
}


def _config(constraint: str, learning_rate: float) -> ml_collections.ConfigDict:
    config = settings.long_experiment("alexnet", constraint)
    config.learning_rate = learning_rate
    config.weight_decay = 5e-4
    config.pretrain_learning_rate = 0.05
    return config


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    from common.training import (
        run as runner,  # not above: the processes that decode photos import this file too, and need no jax
    )

    runner.main("imagenet_alexnet", config, workdir)


if __name__ == "__main__":
    settings.run_main(settings.choose(CONFIGS, sys.argv), "", main)
