"""The paper's GoogLeNet on ImageNet: from pre-trained weights to binary, ternary or power-of-two
ones.

torchvision's file has the auxiliary heads too, which it never trained: they learn here with the
rest.

    python experiments/imagenet_googlenet.py --config.constraint=binary \\
        --config.pretrained=googlenet.pth --workdir=runs/googlenet_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. The same command
resumes a stopped run. The accuracies below are the paper's, top-1 / top-5; this repository has not
reproduced them: that takes ImageNet and days of an accelerator.
"""

import sys

import ml_collections
from common import config as settings
from ml_collections import config_dict


def binary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_googlenet.py --config.pretrained=googlenet.pth
    --config.constraint=binary

    Paper: 64.0 (top-1, abstract of the final version).
    """
    return _config("binary")


def ternary() -> ml_collections.ConfigDict:
    """python experiments/imagenet_googlenet.py --config.pretrained=googlenet.pth
    --config.constraint=ternary

    Paper: not given.
    """
    return _config("ternary")


def one_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_googlenet.py --config.pretrained=googlenet.pth
    --config.constraint=one_bit_shift

    Paper: not given.
    """
    return _config("one_bit_shift")


def two_bit_shift() -> ml_collections.ConfigDict:
    """python experiments/imagenet_googlenet.py --config.pretrained=googlenet.pth
    --config.constraint=two_bit_shift

    Paper: not given.
    """
    return _config("two_bit_shift")


CONFIGS = {
    "binary": binary,
    "ternary": ternary,
    "one_bit_shift": one_bit_shift,
    "two_bit_shift": two_bit_shift,
}


def _config(constraint: str) -> ml_collections.ConfigDict:
    config = settings.long_experiment("googlenet", constraint)
    config.auxiliary_heads = True  # in training; their kernels are not constrained
    # torchvision's own weights expect the images normalised otherwise; None: whatever the weights'
    # origin asks for.
    config.transform_input = config_dict.placeholder(bool)
    return config


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    from common.training import (
        run as runner,  # not above: the processes that decode photos import this file too, and need no jax
    )

    runner.main("imagenet_googlenet", config, workdir)


if __name__ == "__main__":
    settings.run_main(settings.choose(CONFIGS, sys.argv), "", main)
