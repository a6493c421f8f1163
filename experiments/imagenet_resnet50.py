"""The paper's ResNet-50 on ImageNet: from pre-trained to low-bit weights.

ResNet-50 v1.5, as torchvision's; the paper starts from torchvision's first weights.

    python experiments/imagenet_resnet50.py --config.constraint=binary \\
        --config.pretrained=resnet50.pth --workdir=runs/resnet50_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. Rerun the same
command to resume. The paper's accuracies, which this repository has not reproduced, for want of
ImageNet and days on an accelerator:

    | weights        | top-1 | top-5 |
    | -------------- | ----- | ----- |
    | binary         | 74.4  | 92.1  |
    | ternary        | 75.0  | 92.5  |
    | one-bit shift  | 76.0  | 92.9  |
    | two-bit shift  | 75.9  | 92.9  |
    | full precision | 76.0  | 93.0  |
"""

import ml_collections
from common import launch
from common.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config("imagenet_resnet50", "resnet50")
    config.batch_size = config.base_batch_size = 128
    config.by_constraint.learning_rate = {
        "binary": 1e-3,
        "ternary": 1e-3,
        "one_bit_shift": 1e-4,
        "two_bit_shift": 1e-4,
    }
    return config


if __name__ == "__main__":
    launch.run(get_config())
