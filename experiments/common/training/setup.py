"""A config's network with the weights it starts from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from common import models
from common.models import torch_weights as pretrained
from common.training.checkpoints import Checkpoints

PyTree = Any
RANDOM = "random"  # as `config.pretrained`
# Arguments of networks that a config may have as fields.
_OPTIONS = ("auxiliary_heads", "transform_input")


class Network(NamedTuple):
    """A network as the functional step needs it."""

    graphdef: nnx.GraphDef
    params: PyTree
    batch_stats: PyTree
    constrained: str  # pattern of the paths of the constrained parameters


def is_random(pretrained: str) -> bool:
    """Whether `config.pretrained` names no weights: a run that resumes has others, and pre-training needs none."""
    return pretrained in ("", RANDOM)


def is_torch_file(pretrained: str) -> bool:
    """Whether weights come from PyTorch rather than from the workdir of a run."""
    return not is_random(pretrained) and not Path(pretrained).is_dir()


def check_pretrained(config: ml_collections.ConfigDict) -> None:
    """Raises FileNotFoundError if random weights would be post-trained though nobody asked for them."""
    if config.phase == "post_train" and not config.pretrained:
        raise FileNotFoundError(
            "no weights to post-train: --config.pretrained is empty. Give --config.pretrained=FILE, a .pth or .safetensors file of "
            f"{config.network} from PyTorch, or the workdir of a run with --config.phase=pretrain. To post-train random weights "
            f"nevertheless, give --config.pretrained={RANDOM}"
        )


def settle_options(config: ml_collections.ConfigDict) -> None:
    """Fills in what the network should be from where its weights come, in the fields that were left open (None)."""
    if "transform_input" not in config or config.transform_input is not None:
        return
    if is_torch_file(config.pretrained):
        config.transform_input = pretrained.TORCHVISION_OPTIONS[config.network]["transform_input"]
    else:
        saved = {} if is_random(config.pretrained) else saved_config(Path(config.pretrained))
        config.transform_input = bool(saved.get("transform_input"))


def saved_config(workdir: Path) -> dict[str, Any]:
    """What `config.json` of a run says; empty if there is none."""
    path = workdir / "config.json"
    return json.loads(path.read_text()) if path.exists() else {}


def make_network(config: ml_collections.ConfigDict) -> Network:
    """The network, with the weights of `config.pretrained`: a PyTorch file, the workdir of a run,
    or random if "random" or empty.

    Raises:
      FileNotFoundError: if there is no such file or checkpoint.
      ValueError: if it is damaged, or of another network.
    """
    options = {name: config[name] for name in _OPTIONS if name in config}
    dtype = jnp.dtype(config.dtype)

    def create() -> models.Network:
        return models.create(
            config.network, config.num_classes, dtype=dtype, rngs=nnx.Rngs(config.seed), **options
        )

    # Random weights that will be replaced need not be drawn.
    model = create() if is_random(config.pretrained) else nnx.eval_shape(create)
    graphdef, params, batch_stats = models.split_model(model)
    if is_torch_file(config.pretrained):
        params, batch_stats = pretrained.load_torch(config.pretrained, model)
    elif not is_random(config.pretrained):
        params, batch_stats = jax.tree.map(
            jnp.asarray, weights_of_run(Path(config.pretrained), params, batch_stats)
        )
    return Network(graphdef, params, batch_stats, model.constrained)


def weights_of_run(workdir: Path, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """The newest latent weights and batch statistics in a run's workdir, whatever devices it ran
    on, as numpy arrays.

    Args:
      workdir: of the run.
      params: gives structure, shapes and dtypes.
      batch_stats: likewise.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if there is none that can be read, or it is of another network.
    """
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} is not the workdir of a run: there is no {folder}")
    checkpoints = Checkpoints(folder)
    like = jax.tree.map(
        lambda leaf: np.empty(leaf.shape, leaf.dtype),
        {"params": params, "batch_stats": batch_stats},
    )
    found = checkpoints.restore_newest({"weights": like})
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    weights = found[1]["weights"]
    return weights["params"], weights["batch_stats"]
