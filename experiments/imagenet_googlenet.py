"""The paper's GoogLeNet on ImageNet: from pre-trained to low-bit weights.

torchvision's file includes the auxiliary heads, which it never trained: they learn here.

    python experiments/imagenet_googlenet.py --config.constraint=binary \\
        --config.pretrained=googlenet.pth --workdir=runs/googlenet_binary

ImageNet is read by TFDS as ArrayRecord (`--config.data_dir=DIR` or TFDS_DATA_DIR), or, with
`--config.data=folder`, from DIR/train/<wnid>/*.JPEG and DIR/val/<wnid>/*.JPEG. Rerun the same
command to resume. The paper's accuracies, which this repository has not reproduced, for want of
ImageNet and days on an accelerator:

    | weights | top-1 | top-5     |
    | ------- | ----- | --------- |
    | binary  | 64.0  | not given |

The abstract of the final version gives this number; the paper gives no others.
"""

import ml_collections
from common import launch
from common.config import base_config
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    config = base_config("imagenet_googlenet", "googlenet")
    config.learning_rate = 1e-3
    config.auxiliary_heads = True  # in training; their kernels are not constrained
    # torchvision's own weights expect images that are normalised again; None: what the origin of
    # the weights asks for.
    config.transform_input = config_dict.placeholder(bool)
    return config


if __name__ == "__main__":
    launch.run(get_config())
