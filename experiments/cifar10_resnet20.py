"""CBP on CIFAR-10 with ResNet-20: pre-trains in full precision, then post-trains under a
constraint.

    python experiments/cifar10_resnet20.py --config.phase=pretrain --workdir=runs/resnet20
    python experiments/cifar10_resnet20.py --config.pretrained=runs/resnet20
    --config.constraint=binary \\
        --workdir=runs/resnet20_binary

The same command resumes a stopped run. Meant for an accelerator; how it was shortened for a CPU is
said in `experiments/update_readme.py`.
"""

import ml_collections
from common import config as settings


def get_config() -> ml_collections.ConfigDict:
    """The paper's settings, adapted as its authors do for small data: larger rates of weights and multipliers, less patience."""
    config = settings.long_experiment("resnet20", "binary")
    config.data = "cifar10"
    config.num_classes = 10
    config.batch_size = config.base_batch_size = 128
    config.dtype = "float32"
    config.epochs = 200
    config.patience = 5
    config.learning_rate = 1e-2
    config.multiplier_learning_rate = 1e-3
    config.pretrain_epochs = 200
    return config


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    from common.training import run as runner

    runner.main("cifar10_resnet20", config, workdir)


if __name__ == "__main__":
    settings.run_main(get_config(), "", main)
