"""One config for every experiment: an `ml_collections.ConfigDict`, whose fields are all flags."""

import ml_collections
from ml_collections import config_dict

# Fields of a study's config that its runs do not have.
OF_STUDIES = ("methods", "constraints", "distilled", "preset")


class ConfigError(ValueError):
    """A config makes no sense, or does not fit the data, the devices or the run in its workdir."""


def base_config(experiment: str, network: str) -> ml_collections.ConfigDict:
    """Returns every field of a run, with the paper's values for ImageNet.

    Large batches: `learning_rate` and `pretrain_learning_rate` are for batches of `base_batch_size`
    images and are multiplied by `batch_size / base_batch_size`, with a linear warm-up over
    `warmup_epochs` where that is more than 1 (the linear scaling rule of Goyal et al., 2017). The
    multipliers' rate is not scaled: they are updated once per epoch of the schedule, not per step.
    """
    config = ml_collections.ConfigDict()
    config.experiment = experiment
    config.network = network
    config.constraint = "binary"  # or ternary, one_bit_shift, two_bit_shift
    config.phase = "post_train"  # or pretrain: full precision, from random weights
    # Or closing (CBP by the number of steps); no_window (g = infinity from the start, as in the
    # paper's ablation); ste (no multipliers); parq, binary_relax (forward weights drawn to their
    # levels along an annealing); rounding (trained on in full precision, then rounded);
    # full_precision (trained on, never rounded).
    config.method = "cbp"
    config.closes_at = 0.95  # of closing: the share of the run after which weights are on levels
    config.strength = 10.0  # of closing: of its multipliers, in units of the gradient
    # Of parq and binary_relax: the shares of the run between which forward weights are annealed.
    config.anneal_start = 0.0
    config.anneal_end = 0.8  # from here on they are quantized
    config.anneal_steepness = 10.0  # of parq's sigmoid
    # A .pth or .safetensors file, the workdir of a run, or "random": post-train random weights.
    config.pretrained = ""
    # Which parameters: a pattern of their paths, or "all": every kernel, first and last layer too.
    config.constrained = ""  # empty: the network's own, which leaves both free, as in the paper
    config.scale_per_output = False  # rather than one scale for a whole kernel, as in the paper
    config.scale_dtype = "float32"  # or float16: numbers that a file in GGUF can hold
    config.seed = 0
    # Post-training with the outputs of a network of the same kind as targets: pretrained (the
    # weights it starts from), a PyTorch file, or the workdir of a run (its latent weights).
    config.teacher = ""  # none
    # a in (1 - a) * cross-entropy + a * temperature^2 * KL(teacher || student), both softened.
    config.distillation = 0.5
    config.temperature = 2.0

    # Or folder: DIR/train/<class>/*.JPEG and DIR/val/...; cifar10, fashion_mnist, digits;
    # text: of the field `text`; synthetic: noise, to measure the machine.
    config.data = "tfds"
    config.data_dir = ""  # empty: TFDS_DATA_DIR, or TFDS's default
    config.num_classes = 1000
    config.image_size = 224
    config.resize = 256  # of the shorter side, in validation
    # So many training images are held out, the same ones whatever the seed: metrics.jsonl is
    # measured on them, and the test images once, at the end. 0: metrics.jsonl on the test images.
    config.validation_images = 0
    # Of cifar10's pixels: cifar10's mean and deviation, or imagenet's, as the weights were trained.
    # Empty: those of the run that `pretrained` names, else cifar10; a PyTorch file needs a choice.
    config.normalization = ""
    config.color_jitter = 0.2  # brightness, contrast and saturation are scaled by 1 ± this
    config.workers = -1  # processes that decode photos; -1: one per core; 0: none but the main one

    config.batch_size = 256  # over all devices
    config.base_batch_size = 256
    config.eval_batch_size = 0  # 0: batch_size
    config.warmup_epochs = 5
    config.epochs = 200  # an upper bound: watch the CFS, and stop the run once it is low
    config.steps_per_epoch = 0  # 0: one pass over the training images
    config.learning_rate = config_dict.placeholder(float)  # None: that of `by_constraint`
    # Or adamw. Under sgd, cbp and no_window are the paper's recipe; of that, adamw leaves only the
    # multipliers: elements are not clipped, the window lowers no rate, there is no box of ±1.
    config.optimizer = "sgd"
    config.b2 = 0.99  # of adamw
    config.clip_norm = 0.0  # of the gradient of all weights, under adamw; 0: it is not clipped
    # Or constant, cosine, linear; the last two fall to 0. Empty: constant under cbp, else cosine.
    config.schedule = ""
    config.warmup_steps = 0  # before the schedule, whatever the batch; 0: as warmup_epochs says
    config.lr_decay = 0.1  # factor of the learning rate under CBP, from lr_decay_window on
    config.lr_decay_window = 20
    config.multiplier_learning_rate = 1e-4
    config.multiplier_rule = "adam"  # or capped, pi: see `common.training.optimizers`
    # Or bfloat16; with capped, that is half a float32 number per weight instead of three.
    config.multiplier_dtype = "float32"
    config.patience = 20
    config.window_factor = 0.0  # of the window from 10 on; 0: steps of 10, as in the paper
    config.weight_decay = 1e-4
    # After the last step, batch statistics become averages over so many training batches, with the
    # quantized weights; 0: they stay the running ones.
    config.reestimate_batches = 0
    config.pretrain_epochs = 90
    config.pretrain_learning_rate = 0.1  # falls to 0 along a cosine, or as schedule says
    # Of fields that are None, the value for each constraint.
    config.by_constraint = ml_collections.ConfigDict()

    config.dtype = "bfloat16"  # of the activations; parameters and sums are float32
    config.fsdp = 1  # devices that share one copy of the parameters
    # Several hosts: the same command on each. JAX finds the others on TPU pods, SLURM and Open MPI;
    # elsewhere give coordinator (host:port of the first process), num_processes and process_id.
    config.distributed = False
    config.coordinator = ""
    config.num_processes = 0
    config.process_id = -1
    config.checkpoint_epochs = 1  # epochs between two checkpoints
    config.checkpoint_steps = 0  # steps between further checkpoints within an epoch; 0: none
    config.keep_checkpoints = 3
    # Beside the newest, the checkpoint of the highest top-1 accuracy (of text: the lowest loss), in
    # WORKDIR/best. Where multipliers bring weights to their levels, among epochs whose CFS / scale
    # is best_cfs or less.
    config.keep_best = True
    config.best_cfs = 0.01
    config.figures = True  # of the run: its training, and histograms of each layer's weights
    config.keep_weights = False  # of each layer, after each epoch, as weights_stepN.npz
    config.preflight = True  # check data, weights and memory before the first step
    return config


def small_config(experiment: str, network: str) -> ml_collections.ConfigDict:
    """Returns `base_config` with the values that data sets of a few megabytes share.

    Such an experiment is a study (`common.study`): each of `methods` under each constraint.
    """
    config = base_config(experiment, network)
    config.constraint = "all"  # or one of them
    config.methods = ("ste", "cbp")
    config.data = experiment
    config.num_classes = 10
    config.batch_size = config.base_batch_size = 128
    config.eval_batch_size = 1000
    config.warmup_epochs = 0
    config.epochs = 240
    config.steps_per_epoch = 100  # an epoch of the schedule, whatever the size of the data set
    config.learning_rate = 1e-2
    config.multiplier_learning_rate = 1e-3
    config.patience = 5
    config.dtype = "float32"
    config.checkpoint_epochs = 20
    config.keep_checkpoints = 1
    config.keep_best = False  # saving takes as long as a few epochs
    return config
