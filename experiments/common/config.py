"""Configs as `ml_collections`, every field of which is a flag: `--config.FIELD=VALUE`."""

import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence

import ml_collections
from absl import app, flags, logging
from ml_collections import config_flags

INTERRUPTED = 128 + signal.SIGINT  # the exit status after Ctrl-C


def small_experiment() -> ml_collections.ConfigDict:
    """The fields of the small experiments (digits, Fashion-MNIST), with the values both use."""
    config = ml_collections.ConfigDict()
    config.constraint = "all"  # or binary, ternary, one_bit_shift, two_bit_shift
    config.seed = 0
    config.batch_size = 128
    config.steps_per_epoch = (
        100  # steps that make an epoch of the schedule, whatever the data set's size
    )
    config.pretrain_epochs = 20
    config.pretrain_learning_rate = 0.1
    config.epochs = 240
    config.learning_rate = 1e-2
    config.lr_decay = 0.1  # of the learning rate under CBP, from lr_decay_window on
    config.lr_decay_window = 20
    config.multiplier_learning_rate = 1e-3
    config.multiplier_rule = "adam"  # or capped, which keeps no moments
    config.multiplier_dtype = (
        "float32"  # or bfloat16; capped, that is half a float32 number a weight in place of three
    )
    config.patience = 5
    config.window_factor = 0.0  # of the window from 10 on; 0: steps of 10, as in the paper
    config.weight_decay = 1e-4
    return config


def long_experiment(network: str, constraint: str) -> ml_collections.ConfigDict:
    """The fields of the experiments that run for hours (`common.runner`), with the paper's values.

    Large batches: `learning_rate` and `pretrain_learning_rate` are meant for batches of
    `base_batch_size` images and are multiplied by `batch_size / base_batch_size`, with a linear
    warm-up over `warmup_epochs` where that is more than 1 (the linear scaling rule of Goyal et al.,
    2017). The multipliers' rate stays: they are updated by the epoch, not by the step.
    """
    config = ml_collections.ConfigDict()
    config.network = network
    config.constraint = constraint  # binary, ternary, one_bit_shift, two_bit_shift
    config.phase = "post_train"  # or pretrain: full precision, from random weights
    config.method = "cbp"  # or, as in the paper's ablation, no_window (g = infinity from the start) and ste (no multipliers)
    config.pretrained = ""  # a .pth or .safetensors file, or the workdir of a run; "random": post-train random weights
    config.seed = 0

    config.data = "tfds"  # or folder: DIR/train/<class>/*.JPEG and DIR/val/...; cifar10; synthetic: noise, to measure the machine
    config.data_dir = ""  # empty: TFDS_DATA_DIR, or the default of TFDS
    config.num_classes = 1000
    config.image_size = 224
    config.resize = 256  # of the shorter side, in validation
    config.color_jitter = 0.2  # brightness, contrast and saturation are multiplied by 1 ± this much
    config.workers = -1  # processes that decode photos; -1: one a core; 0: none but the main one

    config.batch_size = 256  # of all devices together
    config.base_batch_size = 256
    config.warmup_epochs = 5
    config.epochs = 200  # an upper bound: watch the CFS, and stop the run when it has come down
    config.steps_per_epoch = 0  # 0: one pass over the training images
    config.learning_rate = 1e-3
    config.lr_decay = 0.1  # of the learning rate under CBP, from lr_decay_window on
    config.lr_decay_window = 20
    config.multiplier_learning_rate = 1e-4
    config.multiplier_rule = "adam"  # or capped, which keeps no moments
    config.multiplier_dtype = (
        "float32"  # or bfloat16; capped, that is half a float32 number a weight in place of three
    )
    config.patience = 20
    config.window_factor = 0.0  # of the window from 10 on; 0: steps of 10, as in the paper
    config.weight_decay = 1e-4
    config.pretrain_epochs = 90
    config.pretrain_learning_rate = 0.1  # falls to 0 along a cosine

    config.dtype = "bfloat16"  # of the activations; parameters and sums are float32
    config.fsdp = 1  # devices that share one copy of the parameters
    config.distributed = False  # several hosts: the same command on each; JAX finds the others on TPU pods, SLURM, Open MPI
    config.coordinator = ""  # host:port of the first process, with num_processes and process_id, where JAX cannot find them
    config.num_processes = 0
    config.process_id = -1
    config.checkpoint_steps = 0  # between two checkpoints; 0: at the end of every epoch only
    config.keep_checkpoints = 3
    config.preflight = True  # check data, weights and memory before the first step
    return config


def choose(
    configs: Mapping[str, Callable[[], ml_collections.ConfigDict]], argv: Sequence[str]
) -> ml_collections.ConfigDict:
    """The config of the constraint that a command line names, or the first; its other arguments then change the fields."""
    found = re.findall(r"(?<=\s)--?config\.constraint[=\s](\S+)", " " + " ".join(argv))
    name = found[-1] if found else next(iter(configs))
    if name not in configs:
        sys.exit(f"error: --config.constraint={name} is none of {', '.join(configs)}")
    return configs[name]()


def run_main(
    config: ml_collections.ConfigDict,
    workdir: str,
    main: Callable[[ml_collections.ConfigDict, str], object],
) -> None:
    """Parses `--config.FIELD=VALUE` and `--workdir=DIR`, then calls `main(config, workdir)`.

    After Ctrl-C the process ends with status 130 and a line that says what is left: the message of
    the `KeyboardInterrupt`, if any.
    """
    config_flag = config_flags.DEFINE_config_dict(
        "config", config, "Settings; any field can be overridden."
    )
    workdir_flag = flags.DEFINE_string(
        "workdir", workdir, "Folder that receives what the run writes; by default below runs/."
    )

    def call(argv: list[str]) -> None:
        if len(argv) > 1:
            raise app.UsageError(
                f"unexpected arguments {argv[1:]}: write --config.FIELD=VALUE or --workdir=DIR"
            )
        logging.set_verbosity(logging.ERROR)  # Orbax and TFDS log much that is of no interest here
        try:
            main(config_flag.value, workdir_flag.value)
        except KeyboardInterrupt as interrupt:
            lost = "this run cannot be resumed, and the same command starts it again"
            print(f"interrupted; {interrupt if interrupt.args else lost}", file=sys.stderr)
            sys.exit(INTERRUPTED)

    app.run(call)
