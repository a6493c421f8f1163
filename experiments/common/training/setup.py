"""What a run is made of: its network with the initial weights, its method, its mesh."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import cbp_jax
from common import models
from common.config import ConfigError
from common.input import pipeline
from common.input.batch import HostBatch, Loader
from common.models import torch_weights
from common.training import mesh, optimizers
from common.training.checkpoints import Checkpoints
from common.training.distillation import Teacher, distillation
from common.training.methods import Method, StateFn, make_method
from common.training.settle import PRETRAINED, is_constrained, is_random, is_torch_file
from common.training.step import TrainState, WeightsFn, init_state, latent, make_evaluate

PyTree = Any
# Accuracy of weights and batch statistics on the validation images, or on so many of them; or on
# the test images.
Evaluate = Callable[..., dict[str, float]]
# Arguments of networks that a config may have as fields.
_OPTIONS = (
    "auxiliary_heads", "transform_input", "channels", "width", "depth", "heads", "kv_heads",
    "hidden", "context",
)  # fmt: skip

# What `config.constrained` of "all" stands for: kernels have two axes or more.
_EVERY_KERNEL = "(.*/)?kernel"


class Network(NamedTuple):
    """A network as the functional step needs it."""

    graphdef: nnx.GraphDef
    params: PyTree
    batch_stats: PyTree
    constrained: str  # pattern of the paths of the constrained parameters


class Setup(NamedTuple):
    """What a run needs beside its state."""

    mesh: Mesh
    network: Network
    optimizer: optax.GradientTransformationExtraArgs
    weights_fn: WeightsFn  # as in `methods.Method`
    deployed_fn: WeightsFn  # likewise
    deployed_state_fn: StateFn  # likewise
    constrained: bool  # whether the deployed weights are on levels
    steps_per_epoch: int
    total_steps: int


def make_setup(
    config: ml_collections.FrozenConfigDict, loader: Loader, load_weights: bool = True
) -> Setup:
    """Makes network, optimizer and mesh.

    Args:
      config: of `settle`.
      loader: the data.
      load_weights: whether to read `config.pretrained`; a run that resumes has its weights in a
        checkpoint, and the file may be gone.

    Raises:
      ConfigError: if there are fewer training images than a batch.
      ValueError: if the weights are damaged, or of another network.
      FileNotFoundError: if the weights do not exist.
    """
    steps_per_epoch = config.steps_per_epoch or loader.train_images // config.batch_size
    if steps_per_epoch < 1:
        raise ConfigError(
            f"{loader.train_images} training images are fewer than batch_size={config.batch_size}: "
            "lower --config.batch_size"
        )
    network = make_network(config, config.pretrained if load_weights else "")
    if config.phase == "pretrain":
        epochs = config.pretrain_epochs
        method = Method(optimizers.pretraining(config, steps_per_epoch), latent, latent)
    else:
        epochs = config.epochs
        method = make_method(config, steps_per_epoch, network.constrained)
    return Setup(
        mesh.make_mesh(config.fsdp),
        network,
        *method,
        is_constrained(config),
        steps_per_epoch,
        epochs * steps_per_epoch,
    )


def initial_state(setup: Setup, seed: int) -> tuple[TrainState, TrainState]:
    """Returns a state to start from, on the mesh, and its shardings."""
    network = setup.network
    state = init_state(network.params, network.batch_stats, setup.optimizer, seed)
    shardings = mesh.state_shardings(setup.mesh, state, state.params)
    return mesh.put_state(state, shardings), shardings


def read_teacher(config: ml_collections.FrozenConfigDict, on: Mesh) -> tuple[Teacher, ...]:
    """Returns the teacher's weights on every device of the mesh; an empty tuple if there is none.

    Args:
      config: of `settle`.
      on: the mesh of the run.

    Raises:
      FileNotFoundError: if there is no such file or checkpoint.
      ValueError: if it is damaged, or of another network.
    """
    if distillation(config) is None:
        return ()
    found = make_network(
        config, config.pretrained if config.teacher == PRETRAINED else config.teacher
    )
    teacher = Teacher(found.params, found.batch_stats)
    everywhere = mesh.replicated(on)
    return (mesh.put_state(teacher, jax.tree.map(lambda _: everywhere, teacher)),)


def on_device(batches: Iterator[HostBatch], on: Mesh) -> Any:
    """Returns the batches on the mesh, their transfers started early."""
    sharding = mesh.batch_sharding(on)
    return pipeline.prefetch_to_device(batches, lambda batch: mesh.put_batch(batch, sharding))


def make_evaluation(setup: Setup, loader: Loader) -> Evaluate:
    """Returns a function (weights, batch_stats, limit=None, test=False) -> `make_evaluate`'s."""
    evaluate = make_evaluate(setup.network.graphdef, loader.eval_preprocess)

    def evaluation(
        weights: PyTree, batch_stats: PyTree, limit: int | None = None, test: bool = False
    ) -> dict[str, float]:
        batches = loader.evaluation(test)(limit)
        return evaluate(weights, batch_stats, on_device(batches, setup.mesh))

    return evaluation


def make_network(config: ml_collections.FrozenConfigDict, pretrained: str) -> Network:
    """Makes the config's network.

    Args:
      config: of `settle`.
      pretrained: where its weights come from: a PyTorch file or the workdir of a run; "random" or
        "" draws them.

    Raises:
      FileNotFoundError: if there is no such file or checkpoint.
      ValueError: if it is damaged, or of another network.
      ConfigError: if `config.constrained` matches none of its parameters.
    """
    options = {name: config[name] for name in _OPTIONS if name in config}

    def create() -> models.Network:
        dtype, rngs = jnp.dtype(config.dtype), nnx.Rngs(config.seed)
        return models.create(config.network, config.num_classes, dtype=dtype, rngs=rngs, **options)

    # Random weights that will be replaced need not be drawn.
    model = create() if is_random(pretrained) else nnx.eval_shape(create)
    graphdef, params, batch_stats = models.split_model(model)
    if is_torch_file(pretrained):
        params, batch_stats = torch_weights.load_torch(pretrained, model)
    elif not is_random(pretrained):
        weights = weights_of_run(Path(pretrained), params, batch_stats)
        params, batch_stats = jax.tree.map(jnp.asarray, weights)
    constrained = _constrained(config, params) or model.constrained
    return Network(graphdef, params, batch_stats, constrained)


def every_kernel(config: ml_collections.ConfigDict) -> list[str]:
    """Returns the path of each of the network's kernels, in the order of the tree."""
    drawn = ml_collections.ConfigDict(config.to_dict())
    drawn.constrained = "all"
    network = make_network(ml_collections.FrozenConfigDict(drawn), "random")
    link = cbp_jax.ste("binary", mask=cbp_jax.select(include=network.constrained))
    report = cbp_jax.layer_report(network.params, link.init(network.params))
    return [layer.layer for layer in report.layers]


def _constrained(config: ml_collections.FrozenConfigDict, params: PyTree) -> str:
    """The pattern that the config asks for; empty: the network's own."""
    pattern = _EVERY_KERNEL if config.constrained == "all" else config.constrained
    if pattern:
        try:
            cbp_jax.select(include=pattern)(params)
        except ValueError as error:
            raise ConfigError(f"--config.constrained={pattern!r}: {error}") from error
    return pattern


def weights_of_run(workdir: Path, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """Reads the newest latent weights and batch statistics of a run, as numpy arrays.

    Args:
      workdir: of the run, whatever devices it ran on.
      params: gives structure, shapes and dtypes.
      batch_stats: likewise.

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if none can be read, or it is of another network.
    """
    folder = workdir / "checkpoints"
    if not folder.is_dir():
        raise FileNotFoundError(f"{workdir} is not the workdir of a run: there is no {folder}")
    like = {"params": params, "batch_stats": batch_stats}
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore_newest({"weights": like})
    checkpoints.close()
    if found is None:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    weights = found[1]["weights"]
    return weights["params"], weights["batch_stats"]
