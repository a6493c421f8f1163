"""Evaluates a run's newest checkpoint (accuracy, constraint-failure score) or a PyTorch file.

    python experiments/evaluate.py --workdir=runs/digits/binary
    python experiments/evaluate.py --workdir=runs/resnet50_binary --weights=latent
    python experiments/evaluate.py --workdir=runs/resnet50_binary/best
    python experiments/evaluate.py --network=resnet50 --pretrained=resnet50.pth --data_dir=DIR

A run's `config.json` says what it is; `--data`, `--data_dir` and `--batch_size` may differ. Where
the run held out validation images, it is evaluated on them, as in `metrics.jsonl`; `--test` takes
the test images.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags, logging
from common.input.open import open_data
from common.launch import end_on_interrupt
from common.training.restore import Run, evaluation_config, restore
from common.training.settle import is_constrained
from common.training.setup import make_evaluation, make_setup
from ml_collections import config_dict

import cbp_jax

FLAGS = flags.FLAGS


def evaluate_run(run: Run, latent: bool = False) -> dict[str, float]:
    """Evaluates a run.

    Args:
      run: of `restore`.
      latent: evaluate the latent weights of a constrained run instead of the quantized ones.

    Returns:
      "step", "top1", "top5", "images", "unreadable"; of a constrained run "cfs" and
      "cfs_relative", and of one with multipliers "window".
    """
    state = run.state
    weights, scores = state.params, {"step": float(state.step)}
    if is_constrained(run.config):
        both = (state.params, state.opt_state)
        scores |= {
            "cfs": float(cbp_jax.constraint_failure_score(*both)),
            "cfs_relative": float(cbp_jax.constraint_failure_score(*both, relative=True)),
        }
        window = cbp_jax.layer_report(*both).window
        if window is not None:
            scores["window"] = float(window)
        if not latent:
            weights = jax.jit(cbp_jax.quantize)(*both)
    return scores | run.accuracy(weights, state.batch_stats)


def evaluate_file(fields: dict[str, object], limit: int | None = None) -> dict[str, float]:
    """Evaluates a PyTorch file in full precision: "top1", "top5", "images", "unreadable".

    Args:
      fields: of the config; among them `network` and `pretrained`.
      limit: evaluate on so many images; None: on all.
    """
    if fields["network"] == "googlenet":
        fields = {
            "auxiliary_heads": False,
            "transform_input": config_dict.placeholder(bool),
            **fields,
        }
    config = evaluation_config({**fields, "phase": "pretrain", "learning_rate": 0.0}, new=True)
    loader = open_data(config)
    setup = make_setup(config, loader)
    evaluate = make_evaluation(setup, loader)
    return evaluate(setup.network.params, setup.network.batch_stats, limit)


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.FATAL)
    file = bool(FLAGS.pretrained)
    if len(argv) > 1 or bool(FLAGS.workdir) == file or file != bool(FLAGS.network):
        raise app.UsageError("give --workdir=RUN, or --network=NAME and --pretrained=FILE")
    changes = {
        "data": FLAGS.data,
        "data_dir": FLAGS.data_dir,
        "eval_batch_size": FLAGS.batch_size,
    }
    changes = {name: value for name, value in changes.items() if value}
    limit = FLAGS.limit or None
    try:
        if file:
            weights = {"network": FLAGS.network, "pretrained": FLAGS.pretrained}
            scores = evaluate_file({**weights, **changes}, limit)
        else:
            run = restore(Path(FLAGS.workdir), changes, limit, FLAGS.test)
            scores = evaluate_run(run, FLAGS.weights == "latent")
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    images = scores["images"]
    print(f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%} on {images:.0f} images")
    print(f"loss {scores['loss']:.4f}")
    if scores["unreadable"]:
        print(f"{scores['unreadable']:.0f} images could not be read and are not counted")
    if "cfs" in scores:
        window = f", window {scores['window']:g}" if "window" in scores else ""
        print(f"CFS {scores['cfs']:.2e}, CFS / scale {scores['cfs_relative']:.2e}{window}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "The folder of a run.")
    flags.DEFINE_enum("weights", "quantized", ("quantized", "latent"), "Which to evaluate.")
    flags.DEFINE_string("network", "", "The network of a PyTorch file: resnet50, ...")
    flags.DEFINE_string("pretrained", "", "A .pth or .safetensors file.")
    flags.DEFINE_string("data", "", "tfds, folder, cifar10, ... instead of the run's.")
    flags.DEFINE_string("data_dir", "", "The folder of the data.")
    flags.DEFINE_integer("batch_size", 0, "Images at a time.")
    flags.DEFINE_integer("limit", 0, "Evaluate on so many images, evenly spread; 0: on all.")
    flags.DEFINE_bool("test", False, "On the test images, though others were held out.")
    end_on_interrupt("interrupted")
    app.run(main)
