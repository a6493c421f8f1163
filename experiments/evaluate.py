"""Top-1, top-5 and constraint-failure score of a run's newest checkpoint, or the accuracy of a
PyTorch file.

    python experiments/evaluate.py --workdir=runs/digits/binary
    python experiments/evaluate.py --workdir=runs/resnet50_binary
    python experiments/evaluate.py --workdir=runs/resnet50_binary --weights=latent
    python experiments/evaluate.py --network=resnet50 --pretrained=resnet50.pth --data_dir=DIR

A run says in its `config.json` what it is; `--data`, `--data_dir`, `--batch_size` and `--limit` may
differ from it. Of a small experiment (digits, Fashion-MNIST) all test images count, and
`--data_dir` alone may differ.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import app, flags, logging
from common import config as settings
from common.input.open import Loader, open_data
from common.training import restore as finished
from common.training import run as runner
from common.training import setup as networks
from ml_collections import config_dict

import cbp_jax

_WORKDIR = flags.DEFINE_string("workdir", "", "The folder of a run.")
_WEIGHTS = flags.DEFINE_enum(
    "weights", "quantized", ("quantized", "latent"), "Which weights of a run to evaluate."
)
_NETWORK = flags.DEFINE_string(
    "network", "", "The network of a PyTorch file: alexnet, resnet18, resnet50, googlenet, ..."
)
_PRETRAINED = flags.DEFINE_string("pretrained", "", "A .pth or .safetensors file.")
_DATA = flags.DEFINE_string("data", "", "tfds, folder or synthetic.")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "The folder of the data.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 0, "Images at a time.")
_LIMIT = flags.DEFINE_integer("limit", 0, "Evaluate on so many images, evenly spread; 0: on all.")


def evaluate_run(run: finished.Run, latent: bool = False) -> dict[str, float]:
    """Accuracy and constraint-failure score of a run.

    Args:
      run: of `finished.open_run`.
      latent: evaluate the latent weights instead of the quantized ones, where a run has both.

    Returns:
      "step", "top1", "top5", "images", "unreadable", and of a constrained run "cfs",
      "cfs_relative", "window".
    """
    state = run.state
    weights, scores = state.params, {"step": float(state.step)}
    if run.constrained:
        scores |= {
            "cfs": float(cbp_jax.constraint_failure_score(state.params, state.opt_state)),
            "cfs_relative": float(
                cbp_jax.constraint_failure_score(state.params, state.opt_state, relative=True)
            ),
            "window": float(cbp_jax.window(state.opt_state)),
        }
        if not latent:
            weights = jax.jit(cbp_jax.quantize)(state.params, state.opt_state)
    return scores | run.accuracy(weights, state.batch_stats)


def evaluate_file(
    config: ml_collections.ConfigDict, loader: Loader, limit: int | None = None
) -> dict[str, float]:
    """Accuracy of `config.pretrained` in full precision: "top1", "top5", "images", "unreadable"."""
    networks.settle_options(config)
    setup = runner.make_setup(config, loader.train_images)
    return runner.Evaluation(setup, loader)(setup.network.params, setup.network.batch_stats, limit)


def _config_of_file(changes: Mapping[str, Any]) -> ml_collections.ConfigDict:
    config = settings.long_experiment(_NETWORK.value, "binary")
    config.phase, config.pretrained = "pretrain", _PRETRAINED.value
    if _NETWORK.value == "googlenet":
        config.auxiliary_heads, config.transform_input = False, config_dict.placeholder(bool)
    finished.apply(config, changes)
    return config


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    if (
        len(argv) > 1
        or bool(_WORKDIR.value) == bool(_PRETRAINED.value)
        or bool(_PRETRAINED.value) != bool(_NETWORK.value)
    ):
        raise app.UsageError("give --workdir=RUN, or --network=NAME and --pretrained=FILE")
    changes: dict[str, Any] = {
        "data": _DATA.value,
        "data_dir": _DATA_DIR.value,
        "batch_size": _BATCH_SIZE.value,
    }
    try:
        if _WORKDIR.value:
            run = finished.open_run(Path(_WORKDIR.value), changes, _LIMIT.value or None)
            scores = evaluate_run(run, _WEIGHTS.value == "latent")
        else:
            config = _config_of_file(changes)
            scores = evaluate_file(config, open_data(config), _LIMIT.value or None)
    except (FileNotFoundError, ImportError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(
        f"top-1 {scores['top1']:.2%}, top-5 {scores['top5']:.2%} of {scores['images']:.0f} images"
    )
    if scores["unreadable"]:
        print(f"{scores['unreadable']:.0f} images could not be read and do not count")
    if "cfs" in scores:
        print(
            f"CFS {scores['cfs']:.2e}, CFS / scale {scores['cfs_relative']:.2e}, window {scores['window']:g}"
        )


if __name__ == "__main__":
    app.run(main)
