"""CBP on CIFAR-10 with ResNet-20: pre-trains in full precision, then post-trains.

    python experiments/cifar10_resnet20.py --config.phase=pretrain --workdir=runs/resnet20
    python experiments/cifar10_resnet20.py --config.pretrained=runs/resnet20 \\
        --config.constraint=binary --workdir=runs/resnet20_binary

Or post-trains a network that others trained, such as akamaster/pytorch_resnet_cifar10's; they
normalised images with ImageNet's mean and deviation (ResNet-56 is `--config.depth=9`):

    python experiments/cifar10_resnet20.py --config.pretrained=resnet20-12fca82f.th \\
        --config.normalization=imagenet --config.constraint=binary --workdir=runs/others_binary

`--config.validation_images=5000` holds images out of training and measures the test images once, at
the end. Others have trained on the images held out, so such a network's accuracy on them says
little before it is quantized.

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
