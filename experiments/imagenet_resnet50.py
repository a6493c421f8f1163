"""The paper's ResNet-50 on ImageNet: from pre-trained weights to binary, ternary or power-of-two
ones.

ResNet-50 v1.5, as torchvision's; the paper starts from torchvision's first weights.

    python experiments/imagenet_resnet50.py --config.constraint=binary \\
        --config.pretrained=resnet50.pth --workdir=runs/resnet50_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. The same command
resumes a stopped run. The accuracies below are the paper's, top-1 / top-5; this repository has not
reproduced them: that takes ImageNet and days of an accelerator.
"""

import sys

import ml_collections
from common import config as settings


def binary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet50.py --config.pretrained=resnet50.pth
    --config.constraint=binary

    Paper: 74.4 / 92.1 (full precision 76.0 / 93.0).
    """
    return _config("binary", learning_rate=1e-3)


def ternary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet50.py --config.pretrained=resnet50.pth
    --config.constraint=ternary

    Paper: 75.0 / 92.5 (full precision 76.0 / 93.0).
    """
    return _config("ternary", learning_rate=1e-3)


def one_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet50.py --config.pretrained=resnet50.pth
    --config.constraint=one_bit_shift

    Paper: 76.0 / 92.9 (full precision 76.0 / 93.0).
    """
    return _config("one_bit_shift", learning_rate=1e-4)


def two_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet50.py --config.pretrained=resnet50.pth
    --config.constraint=two_bit_shift

    Paper: 75.9 / 92.9 (full precision 76.0 / 93.0).
    """
    return _config("two_bit_shift", learning_rate=1e-4)


CONFIGS = {
    "binary": binary,
    "ternary": ternary,
    "one_bit_shift": one_bit_shift,
    "two_bit_shift": two_bit_shift,
}


def _config(constraint: str, learning_rate: float) -> ml_collections.ConfigDict:
    config = settings.long_experiment("resnet50", constraint)
    config.batch_size = config.base_batch_size = 128
    config.learning_rate = learning_rate
    return config


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    from common.training import (
        run as runner,  # not above: the processes that decode photos import this file too, and need no jax
    )

    runner.main("imagenet_resnet50", config, workdir)


if __name__ == "__main__":
    settings.run_main(settings.choose(CONFIGS, sys.argv), "", main)
