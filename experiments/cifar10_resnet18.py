"""CBP on CIFAR-10 with ResNet-18, whose stem is a 3x3 convolution without pooling.

    python experiments/cifar10_resnet18.py --config.phase=pretrain --workdir=runs/cifar_resnet18
    python experiments/cifar10_resnet18.py --config.pretrained=runs/cifar_resnet18 \\
        --config.constraint=binary --workdir=runs/cifar_resnet18_binary

Rerun the same command to resume. For an accelerator: a step costs more than ten times ResNet-20's.
"""

import cifar10_resnet20
import ml_collections
from common import launch


def get_config() -> ml_collections.ConfigDict:
    """As for ResNet-20, but computed in bfloat16."""
    config = cifar10_resnet20.get_config()
    config.experiment = "cifar10_resnet18"
    config.network = "cifar_resnet18"
    del config.depth
    config.dtype = "bfloat16"
    return config


if __name__ == "__main__":
    launch.run(get_config())
