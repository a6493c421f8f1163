"""The paper's ResNet-18 on ImageNet: from pre-trained weights to binary, ternary or power-of-two
ones.

`--config.method=no_window` and `--config.method=ste` are the paper's ablation: 60.2 / 82.7 and 64.6
/ 85.9 with binary weights.

    python experiments/imagenet_resnet18.py --config.constraint=binary \\
        --config.pretrained=resnet18.pth --workdir=runs/resnet18_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. The same command
resumes a stopped run. The accuracies below are the paper's, top-1 / top-5; this repository has not
reproduced them: that takes ImageNet and days of an accelerator.
"""

import sys

import ml_collections
from common import config as settings


def binary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet18.py --config.pretrained=resnet18.pth
    --config.constraint=binary

    Paper: 66.6 / 87.1 (full precision 69.6 / 89.2).
    """
    return _config("binary")


def ternary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet18.py --config.pretrained=resnet18.pth
    --config.constraint=ternary

    Paper: 68.9 / 88.5 (full precision 69.6 / 89.2).
    """
    return _config("ternary")


def one_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet18.py --config.pretrained=resnet18.pth
    --config.constraint=one_bit_shift

    Paper: 69.4 / 88.8 (full precision 69.6 / 89.2).
    """
    return _config("one_bit_shift")


def two_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_resnet18.py --config.pretrained=resnet18.pth
    --config.constraint=two_bit_shift

    Paper: 69.4 / 88.8 (full precision 69.6 / 89.2).
    """
    return _config("two_bit_shift")


CONFIGS = {
    "binary": binary,
    "ternary": ternary,
    "one_bit_shift": one_bit_shift,
    "two_bit_shift": two_bit_shift,
}


def _config(constraint: str) -> ml_collections.ConfigDict:
    return settings.long_experiment("resnet18", constraint)  # the paper's settings are the defaults


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    from common.training import (
        run as runner,  # not above: the processes that decode photos import this file too, and need no jax
    )

    runner.main("imagenet_resnet18", config, workdir)


if __name__ == "__main__":
    settings.run_main(settings.choose(CONFIGS, sys.argv), "", main)
