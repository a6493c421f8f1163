"""CBP on CIFAR-10 with ResNet-20: pre-trains in full precision, then post-trains.

    python experiments/cifar10_resnet20.py --config.phase=pretrain --workdir=runs/resnet20
    python experiments/cifar10_resnet20.py --config.pretrained=runs/resnet20 \\
        --config.constraint=binary --workdir=runs/resnet20_binary

Rerun the same command to resume. Meant for an accelerator; `experiments/update_pages.py` has the
settings of a run cut short for a CPU.
"""

import ml_collections
from common import launch
from common.config import base_config


def get_config() -> ml_collections.ConfigDict:
    """The paper's settings, adapted as its authors do for small data.

    Rates of weights and multipliers are larger, and there is less patience.
    """
    config = base_config("cifar10_resnet20", "resnet20")
    config.depth = 3  # blocks per stage
    config.data = "cifar10"
    config.num_classes = 10
    config.batch_size = config.base_batch_size = 128
    config.dtype = "float32"
    config.patience = 5
    config.learning_rate = 1e-2
    config.multiplier_learning_rate = 1e-3
    config.pretrain_epochs = 200
    return config


if __name__ == "__main__":
    launch.run(get_config())
