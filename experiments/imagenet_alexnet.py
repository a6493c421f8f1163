"""The paper's AlexNet with batch normalization on ImageNet: from pre-trained to low-bit weights.

No public file of this network exists, so pre-train it first (the authors' own .pth also works):

    python experiments/imagenet_alexnet.py --config.phase=pretrain --workdir=runs/alexnet

    python experiments/imagenet_alexnet.py --config.constraint=binary \\
        --config.pretrained=runs/alexnet --workdir=runs/alexnet_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. Rerun the same
command to resume. The paper's accuracies, which this repository has not reproduced, for want of
ImageNet and days on an accelerator:

    | weights        | top-1 | top-5 |
    | -------------- | ----- | ----- |
    | binary         | 58.0  | 80.6  |
    | ternary        | 58.8  | 81.2  |
    | one-bit shift  | 60.8  | 82.6  |
    | two-bit shift  | 60.9  | 82.8  |
    | full precision | 60.0  | 82.4  |
"""

import ml_collections
from common import launch
from common.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config("imagenet_alexnet", "alexnet")
    config.weight_decay = 5e-4
    config.pretrain_learning_rate = 0.05
    config.by_constraint.learning_rate = {
        "binary": 1e-3,
        "ternary": 1e-3,
        "one_bit_shift": 1e-4,
        "two_bit_shift": 1e-4,
    }
    return config


if __name__ == "__main__":
    launch.run(get_config())
