"""The paper's ResNet-18 on ImageNet: from pre-trained to low-bit weights.

    python experiments/imagenet_resnet18.py --config.constraint=binary \\
        --config.pretrained=resnet18.pth --workdir=runs/resnet18_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. Rerun the same
command to resume. The paper's accuracies, which this repository has not reproduced, for want of
ImageNet and days on an accelerator:

    | weights        | top-1 | top-5 |
    | -------------- | ----- | ----- |
    | binary         | 66.6  | 87.1  |
    | ternary        | 68.9  | 88.5  |
    | one-bit shift  | 69.4  | 88.8  |
    | two-bit shift  | 69.4  | 88.8  |
    | full precision | 69.6  | 89.2  |

The ablation, with binary weights: 60.2 / 82.7 by `--config.method=no_window`, 64.6 / 85.9 by `ste`.
"""

import ml_collections
from common import launch
from common.config import base_config


def get_config() -> ml_collections.ConfigDict:
    config = base_config("imagenet_resnet18", "resnet18")
    config.learning_rate = 1e-3
    return config


if __name__ == "__main__":
    launch.run(get_config())
