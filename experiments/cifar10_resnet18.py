"""CBP on CIFAR-10 with ResNet-18, whose stem is a 3x3 convolution without pooling.

    python experiments/cifar10_resnet18.py --config.phase=pretrain --workdir=runs/cifar_resnet18
    python experiments/cifar10_resnet18.py --config.pretrained=runs/cifar_resnet18
    --config.constraint=binary \\
        --workdir=runs/cifar_resnet18_binary

The same command resumes a stopped run. For an accelerator: a step is more than ten times the
arithmetic of ResNet-20's.
"""

import ml_collections
from cifar10_resnet20 import get_config as resnet20_config
from common import config as settings


def get_config() -> ml_collections.ConfigDict:
    """As for ResNet-20, but computed in bfloat16."""
    config = resnet20_config()
    config.network = "cifar_resnet18"
    config.dtype = "bfloat16"
    return config


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    from common.training import run as runner

    runner.main("cifar10_resnet18", config, workdir)


if __name__ == "__main__":
    settings.run_main(get_config(), "", main)
