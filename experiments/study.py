"""Methods of post-training side by side: each tuned alike on validation data, then several seeds.

    python experiments/study.py --config.ground=fashion_mnist --workdir=runs/study/fashion_mnist
    python experiments/study.py --config.ground=resnet20 --config.pretrained=FILE \\
        --workdir=runs/study/resnet20
    python experiments/study.py --config.ground=fashion_mnist --config.variants=course \\
        --config.constraints="('binary','ternary')" --workdir=runs/study/course
    python experiments/study.py --config.ground=llama --config.text=FILE \\
        --workdir=runs/study/llama

FILE are the weights of ResNet-20 of akamaster/pytorch_resnet_cifar10, and a text.
Rerun the same command to resume. `experiments/update_pages.py` makes tables and figures of what the
runs left in `experiments/results/study`.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import cifar10_resnet20
import fashion_mnist
import ml_collections
import shakespeare_llama
from common import launch
from common.config import OF_STUDIES, ConfigError

if TYPE_CHECKING:
    from common.comparison import Comparison

Trials = Mapping[str, Sequence[Mapping[str, Any]]]  # by method, or variant of one
CONSTRAINTS = ("binary", "ternary", "one_bit_shift", "two_bit_shift")
GROUNDS = ("fashion_mnist", "resnet20", "llama")
METHODS = (
    "full_precision", "rounding", "ste", "binary_relax", "parq", "no_window", "cbp", "closing",
)  # fmt: skip
RULES = ("adam", "capped", "pi")  # of the multipliers
# Fields of a run's config that a study has too.
_PASSED_ON = ("data_dir", "teacher", "constrained", "keep_weights")


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.ground = "fashion_mnist"  # or resnet20, llama
    config.methods = METHODS
    config.constraints = CONSTRAINTS
    config.tuned_on = "binary"
    config.seeds = 3
    # Instead of trials: course (of closing: when it closes, how strong its multipliers are), rules
    # (of the paper's multipliers), or layers (all constrained; then each of them free in turn).
    config.variants = ""
    config.closes_at = (0.5, 0.7, 0.8, 0.9, 1.0)  # of course
    config.strengths = (0.0, 10.0, 100.0)  # of course
    config.multiplier_rates = (1e-3, 3e-3)  # of rules
    config.learning_rates = ()  # that each method tries; empty: three of the ground's
    config.rates_alone = False  # try nothing else
    config.epochs = 0  # 0: those of the ground
    config.pretrained = ""  # of resnet20: the file
    config.text = ""  # of llama: the file
    config.data_dir = ""  # empty: TFDS_DATA_DIR
    config.teacher = ""  # or pretrained: distillation, for all methods
    config.constrained = ""  # or all: first and last layer too
    config.keep_weights = False  # of each layer, after each epoch, for a figure
    config.distributed = False
    return config


def base_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config of a run on a ground."""
    ground = {
        "fashion_mnist": _fashion_mnist,
        "resnet20": _resnet20,
        "llama": shakespeare_llama.get_config,
    }[config.ground]
    base = ground()
    base.update({name: config[name] for name in _PASSED_ON})
    base.pretrained, base.text = config.pretrained, config.text
    if config.epochs:
        base.epochs = config.epochs
    for name in OF_STUDIES:
        if name in base:
            del base[name]
    base.constraint, base.figures = config.tuned_on, False
    return base


def _fashion_mnist() -> ml_collections.ConfigDict:
    config = fashion_mnist.get_config()
    config.width = 24  # so narrow that binary weights cost a point
    config.epochs = 60  # 6,000 steps
    config.steps_per_epoch = 100
    config.patience, config.window_factor = 1, 1.5  # so that the paper's window closes in time
    config.validation_images = 10_000
    config.reestimate_batches = 50
    config.checkpoint_epochs = 60
    return config


def _resnet20() -> ml_collections.ConfigDict:
    config = cifar10_resnet20.get_config()
    config.normalization = "imagenet"  # what the others' weights expect
    config.epochs = 30  # of a third of the 45,000 training images, so 10 of all
    config.steps_per_epoch = 117
    config.patience, config.window_factor = 1, 1.5
    config.validation_images = 5_000
    config.reestimate_batches = 50
    config.eval_batch_size = 1000
    config.checkpoint_steps = 100
    config.keep_checkpoints = 1
    return config


def trials(
    method: str, rates: Sequence[float], rates_alone: bool = False
) -> list[Mapping[str, Any]]:
    """The settings of a method to try: each learning rate with two values of what else it has."""
    if rates_alone:
        return [{"learning_rate": rate} for rate in rates]
    other: dict[str, Sequence[Any]] = {"schedule": ("cosine", "linear")}
    if method == "closing":
        other = {"closes_at": (0.6, 0.8)}
    elif method in ("parq", "binary_relax"):
        other = {"anneal_end": (0.6, 0.8)}
    elif method in ("cbp", "no_window"):
        other = {"multiplier_learning_rate": (1e-3, 3e-3)}
    (name, values), *_ = other.items()
    return [
        {"learning_rate": rate, name: value} for rate, value in itertools.product(rates, values)
    ]


def course(rate: float, shares: Sequence[float], strengths: Sequence[float]) -> Trials:
    """Variants of closing at one learning rate; of strength 0 are weights put on their levels."""
    fixed = {"method": "closing", "learning_rate": rate}
    return {
        f"closes_at_{share:g}_strength_{strength:g}": [
            {**fixed, "closes_at": share, "strength": strength}
        ]
        for share, strength in itertools.product(shares, strengths)
    }


def rules(rate: float, multiplier_rates: Sequence[float]) -> Trials:
    """The paper's method under each rule of the multipliers, at one learning rate."""
    return {
        f"{rule}_{multiplier_rate:g}": [
            {
                "method": "cbp",
                "learning_rate": rate,
                "multiplier_rule": rule,
                "multiplier_learning_rate": multiplier_rate,
            }
        ]
        for rule, multiplier_rate in itertools.product(RULES, multiplier_rates)
    }


def layers(base: ml_collections.ConfigDict, methods: Sequence[str], rate: float) -> Trials:
    """Every kernel constrained; then each of them in full precision in turn."""
    from common.report.layers import variant
    from common.training.setup import every_kernel

    kernels = every_kernel(base)
    chosen = {"learning_rate": rate, "closes_at": 0.8}  # by the trials on Fashion-MNIST
    patterns = {None: "all"} | {kernel: f"(?!{kernel}$).*kernel" for kernel in kernels}
    return {
        variant(method, kernel): [{**chosen, "method": method, "constrained": pattern}]
        for method in methods
        for kernel, pattern in patterns.items()
    }


def comparison(config: ml_collections.ConfigDict) -> "Comparison":
    from common.comparison import Comparison  # slow to import, as `launch` says

    for name, values, choices in (
        ("ground", (config.ground,), GROUNDS),
        ("methods", config.methods, METHODS),
        ("constraints", (*config.constraints, config.tuned_on), CONSTRAINTS),
        ("variants", (config.variants,), ("", "course", "rules", "layers")),
    ):
        if unknown := [value for value in values if value not in choices]:
            known = ", ".join(choice or "''" for choice in choices)
            raise ConfigError(f"--config.{name}: {unknown[0]!r} is none of {known}")
    own = (5e-4, 1e-3, 2e-3) if config.ground == "llama" else (1e-2, 3e-2, 1e-1)
    rates, base = config.learning_rates or own, base_config(config)
    methods: Trials = {
        method: trials(method, rates, config.rates_alone) for method in config.methods
    }
    if config.variants == "course":
        methods = course(rates[-1], config.closes_at, config.strengths)
    elif config.variants == "rules":
        methods = rules(rates[-1], config.multiplier_rates)
    elif config.variants == "layers":
        methods = layers(base, config.methods, rates[-1])
    return Comparison(
        base=base,
        constraints=config.constraints,
        tuned_on=config.tuned_on,
        trials=methods,
        seeds=config.seeds,
        better="eval_loss" if config.ground == "llama" else "top1",
    )


if __name__ == "__main__":
    launch.comparison(get_config(), comparison)
