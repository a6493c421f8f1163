"""A long run from its config: network, data, optimizer, checkpoints, and what it leaves in its workdir."""

import contextlib
import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

import cbp_jax
from common import config as settings
from common.input import pipeline
from common.input.in_memory import UNREADABLE
from common.input.open import Loader, open_data
from common.report import figures
from common.report import workdir as report
from common.training import loop, mesh, optimizers, preflight, progress
from common.training import metrics as monitor
from common.training import setup as networks
from common.training import step as train
from common.training.checkpoints import AnotherTreeError, Checkpoints
from common.training.setup import Network

PyTree = Any
_PREFLIGHT_IMAGES = 1000
_WEIGHTS_BEFORE = "weights_before.npz"
# What a run cannot change on its way: the position in the data is the step, and the schedule counts
# steps.
_FIXED = ("batch_size", "seed", "method", "data", "image_size", "color_jitter", "num_classes")


class Setup(NamedTuple):
    """What a run needs beside its state."""

    mesh: Mesh
    network: Network
    optimizer: optax.GradientTransformationExtraArgs
    weights_fn: train.WeightsFn
    steps_per_epoch: int


def main(experiment: str, config: ml_collections.ConfigDict, workdir: str) -> None:
    """`run` as a command: finds the other hosts first, and ends with a plain message where
    something is not there.

    Without a workdir it is `runs/EXPERIMENT_CONSTRAINT`, or `_pretrain`, so that no run meets
    another's checkpoints.
    """
    kind = config.phase if config.phase == "pretrain" else config.constraint
    method = "" if config.method == "cbp" or config.phase == "pretrain" else f"_{config.method}"
    workdir = workdir or f"runs/{experiment}_{kind}{method}"
    if config.distributed:  # before anything else of JAX
        process_id = None if config.process_id < 0 else config.process_id
        jax.distributed.initialize(
            config.coordinator or None, config.num_processes or None, process_id
        )
    try:
        run(experiment, config, workdir)
    except (FileNotFoundError, MemoryError, ImportError, AnotherTreeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        if interrupt.args:  # saved, and `run` said so
            sys.exit(settings.INTERRUPTED)
        # Before the first step, after the last one, or on one of several hosts.
        raise KeyboardInterrupt(
            "the same command resumes from the newest checkpoint, or starts again if there is none"
        ) from None


def make_setup(config: ml_collections.ConfigDict, train_images: int) -> Setup:
    """Everything that the config says, but the data.

    Raises:
      ValueError: if a field makes no sense; it names the field.
    """
    if min(config.epochs, config.pretrain_epochs) < 1:
        raise ValueError(
            f"--config.epochs={config.epochs} and --config.pretrain_epochs={config.pretrain_epochs} must be positive"
        )
    if config.phase not in ("pretrain", "post_train"):
        raise ValueError(f"--config.phase={config.phase!r} is none of pretrain, post_train")
    steps_per_epoch = config.steps_per_epoch or train_images // config.batch_size
    if steps_per_epoch < 1:
        raise ValueError(
            f"{train_images} training images are fewer than batch_size={config.batch_size}: lower --config.batch_size"
        )
    network = networks.make_network(config)
    if config.phase == "pretrain":
        optimizer, weights_fn = optimizers.pretraining(config, steps_per_epoch), train.latent
    else:
        optimizer, weights_fn = (
            optimizers.post_training(config, steps_per_epoch, network.constrained),
            cbp_jax.quantize,
        )
    return Setup(mesh.make_mesh(config.fsdp), network, optimizer, weights_fn, steps_per_epoch)


def initial_state(setup: Setup, seed: int) -> tuple[train.TrainState, train.TrainState]:
    """A state to start from on the mesh, and its shardings."""
    state = train.init_state(setup.network.params, setup.network.batch_stats, setup.optimizer, seed)
    shardings = mesh.state_shardings(setup.mesh, state, state.params)
    return mesh.put_state(state, shardings), shardings


def run(
    experiment: str, config: ml_collections.ConfigDict, workdir: str | os.PathLike[str]
) -> report.Summary | None:
    """Runs the config's phase to its end, from the newest checkpoint in the workdir if there is
    one.

    Args:
      experiment: its name, for the summary.
      config: of `settings.long_experiment`.
      workdir: the run's folder; on several hosts one that all of them see.

    Returns:
      The summary; None if SIGTERM stopped the run before its end. Then the same call resumes.

    Raises:
      ValueError: if a field of the config makes no sense, or does not fit the checkpoint in the
        workdir.
      FileNotFoundError: if the data or the pre-trained file are not there, or no such file is named
        for post-training.
      MemoryError: if a step does not fit the device.
      KeyboardInterrupt: after Ctrl-C. Where it has a message, which says so, the state was saved
        before.
    """
    with contextlib.ExitStack() as stack:
        return _run(
            experiment, ml_collections.ConfigDict(config), Path(workdir), stack
        )  # the caller's config stays as it is


def _run(
    experiment: str, config: ml_collections.ConfigDict, workdir: Path, stack: contextlib.ExitStack
) -> report.Summary | None:
    started = time.perf_counter()
    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    stack.callback(checkpoints.close)
    resumes = checkpoints.newest() is not None
    if resumes:
        _compare(config, networks.saved_config(workdir))
    else:
        networks.check_pretrained(config)
        networks.settle_options(config)
    record = ml_collections.ConfigDict(config)
    if resumes:
        config.pretrained = ""  # the weights are in the checkpoint, and the file may be gone
    loader = open_data(config)
    setup = make_setup(config, loader.train_images)
    state, shardings = initial_state(setup, config.seed)
    step_fn = train.make_train_step(
        setup.network.graphdef,
        setup.optimizer,
        setup.weights_fn,
        loader.train_preprocess,
        shardings,
    )
    evaluation = Evaluation(setup, loader)

    notes = {name: config[name] for name in _FIXED} | {
        "images": loader.train_images,
        "steps_per_epoch": setup.steps_per_epoch,
    }
    restored = loop.restore(checkpoints, state, put_aside=True)
    if restored is not None:
        state, saved = restored
        _check_notes(saved, notes)
        notes = saved
    step = int(state.step)
    folder = report.Workdir(workdir, step) if jax.process_index() == 0 else None
    if folder:
        folder.write_config(record)
    total_steps = setup.steps_per_epoch * (
        config.pretrain_epochs if config.phase == "pretrain" else config.epochs
    )
    _say(
        f"{experiment}: {loader.train_images:,} training and {loader.eval_images:,} validation images"
    )
    _say(f"step {step:,} of {total_steps:,}")
    batches = stream = _on_device(loader.train(step), setup.mesh)
    stack.callback(batches.close)
    if config.preflight:
        stream, step_fn = _preflight(config, state, step_fn, batches, evaluation)
    if not resumes and config.phase == "post_train":
        notes["full_precision_top1"] = evaluation(state.params, state.batch_stats)["top1"]
        _say(f"top-1 of the weights it starts from: {notes['full_precision_top1']:.2%}")
        before = monitor.relative_weights(state)
        if folder:
            np.savez(folder.path / _WEIGHTS_BEFORE, **before)  # type: ignore[arg-type]

    schedule = optimizers.learning_rate(config, setup.steps_per_epoch)
    writer = _summary_writer(folder, step) if folder else None
    if writer:
        stack.callback(writer.close)
    last: dict[str, Any] = {}

    def seconds() -> float:
        return notes.get("seconds", 0.0) + time.perf_counter() - started

    def on_epoch(row: dict[str, Any]) -> None:
        last.update(row)
        if folder and writer:
            folder.append_metrics(row)
            _write_scalars(writer, row)

    plan = loop.Plan(
        description=config.constraint if config.phase == "post_train" else "full precision",
        steps_per_epoch=setup.steps_per_epoch,
        total_steps=total_steps,
        batch_size=config.batch_size,
        checkpoint_steps=config.checkpoint_steps,
        measure=lambda state: _measure(config, setup, state, schedule, evaluation),
        on_epoch=on_epoch,
        figures=functools.partial(progress.figures, with_window=config.method == "cbp"),
        notes=lambda: {**notes, "seconds": seconds()},
    )
    state, finished, interrupted = loop.run(plan, state, step_fn, stream, checkpoints)
    if not finished:
        stopped = f"stopped at step {int(state.step)} of {total_steps}, saved; the same command resumes from there"
        _say(stopped)
        if interrupted:
            raise KeyboardInterrupt(stopped)
        return None
    summary = _summary(experiment, config, state, last, notes.get("full_precision_top1"), seconds())
    after = monitor.relative_weights(state) if config.phase == "post_train" else {}
    if folder:
        folder.write_summary(summary)
        if config.phase == "post_train":
            _draw(folder, config, summary, after)
            _say(f"\n{report.results_table([summary])}")
        _say(f"\ntop-1 {summary.top1:.2%}, top-5 {summary.top5:.2%}; written to {folder.path}")
    return summary


class Evaluation:
    """Accuracy of weights on the validation images, or on some of them."""

    def __init__(self, setup: Setup, loader: Loader):
        self._mesh, self._loader = setup.mesh, loader
        self._evaluate = train.make_evaluate(setup.network.graphdef, loader.eval_preprocess)

    def __call__(
        self, weights: PyTree, batch_stats: PyTree, limit: int | None = None
    ) -> dict[str, float]:
        batches = _on_device(self._loader.evaluate(limit), self._mesh)
        return self._evaluate(weights, batch_stats, batches)


def _on_device(batches: Iterator[dict[str, np.ndarray]], on: Mesh) -> Any:
    put = functools.partial(mesh.put_batch, sharding=mesh.batch_sharding(on))
    return pipeline.prefetch_to_device(batches, put)


def _preflight(
    config: ml_collections.ConfigDict,
    state: train.TrainState,
    step_fn: Any,
    batches: Any,
    evaluation: Evaluation,
) -> tuple[Any, Any]:
    """Reads, compiles and measures before the first step; gives the batches and the compiled step."""
    started = time.perf_counter()
    first = next(batches)
    unreadable = int(jnp.sum(first["label"] == UNREADABLE))
    _say(
        f"data: a batch of {config.batch_size} in {time.perf_counter() - started:.1f} s, {unreadable} of it unreadable"
    )
    started = time.perf_counter()
    compiled = step_fn.lower(state, first).compile()
    needed = preflight.memory_needed(compiled)
    line = preflight.check_memory(needed, preflight.memory_there())
    _say(f"memory: {line} (compiled in {time.perf_counter() - started:.0f} s)")
    accuracy = evaluation(state.params, state.batch_stats, _PREFLIGHT_IMAGES)
    _say(
        f"validation: {accuracy['images']:.0f} images read, {accuracy['unreadable']:.0f} unreadable"
    )
    if not networks.is_random(config.pretrained):
        shown = f"top-1 {accuracy['top1']:.2%} on {accuracy['images']:.0f} validation images"
        _say(f"weights: {config.pretrained} is complete; {shown}")
    return itertools.chain([first], batches), compiled


def _measure(
    config: ml_collections.ConfigDict,
    setup: Setup,
    state: train.TrainState,
    schedule: optax.Schedule,
    evaluation: Evaluation,
) -> dict[str, Any]:
    rate = float(schedule(int(state.step)))
    weights: PyTree = state.params
    row: dict[str, Any] = {}
    if config.phase == "post_train":
        row = {name: float(value) for name, value in monitor.cbp_metrics(state).items()}
        row["lagrangian"] /= setup.steps_per_epoch
        if config.method == "cbp" and row["window"] >= config.lr_decay_window:
            rate *= config.lr_decay
        weights = jax.jit(cbp_jax.quantize)(state.params, state.opt_state)
    accuracy = evaluation(weights, state.batch_stats)
    row |= {"learning_rate": rate, "top1": accuracy["top1"], "top5": accuracy["top5"]}
    if config.phase == "post_train":
        row["violation"] = {
            layer: float(value) for layer, value in monitor.layer_violations(state).items()
        }
    return row


def _summary_writer(folder: report.Workdir, step: int) -> Any:
    """TensorBoard's; what it has of later steps will come again."""
    from tensorboardX import SummaryWriter  # slow to import where torch is installed

    return SummaryWriter(str(folder.path / "tensorboard"), purge_step=step + 1)


def _write_scalars(writer: Any, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if isinstance(value, dict):
            for layer, violation in value.items():
                writer.add_scalar(f"{name}/{layer}", violation, row["step"])
        elif name not in ("epoch", "step"):
            writer.add_scalar(name, value, row["step"])
    writer.flush()


def _summary(
    experiment: str,
    config: ml_collections.ConfigDict,
    state: train.TrainState,
    row: dict[str, Any],
    before: float | None,
    seconds: float,
) -> report.Summary:
    constrained = config.phase == "post_train"
    float32 = report.float32_bytes(state.params)
    packed = report.packed_bytes(state.params, state.opt_state)[0] if constrained else float32
    return report.Summary(
        experiment=experiment,
        constraint=config.constraint if constrained else "full_precision",
        seed=config.seed,
        full_precision_top1=row["top1"] if before is None else before,
        ste_top1=None,
        top1=row["top1"],
        top5=row["top5"],
        cfs=row["cfs"] if constrained else 0.0,
        cfs_relative=row["cfs_relative"] if constrained else 0.0,
        bits_per_weight=cbp_jax.get_constraint(config.constraint).bits if constrained else 32,
        bytes_packed=packed,
        bytes_float32=float32,
        seconds=seconds,
    )


def _draw(
    folder: report.Workdir,
    config: ml_collections.ConfigDict,
    summary: report.Summary,
    after: dict[str, np.ndarray],
) -> None:
    title = f"{summary.experiment}, {config.constraint.replace('_', '-')} weights"
    rows = folder.rows(folder.path)
    ste, cbp = (rows, []) if config.method == "ste" else ([], rows)
    figures.plot_training(
        folder.figures / "training.png", title, cbp, ste, summary.full_precision_top1
    )
    before = np.load(folder.path / _WEIGHTS_BEFORE)
    levels = cbp_jax.get_constraint(config.constraint).levels
    for layer, weights in after.items():
        path = folder.figures / f"weights_{layer.replace('/', '_')}.png"
        figures.plot_weights(
            path, f"{title}: {layer}", {"before": before[layer], "after": weights}, levels
        )


def _compare(config: ml_collections.ConfigDict, saved: dict[str, Any]) -> None:
    """Says what is not as it was when the run began; its network stays what it was."""
    if "transform_input" in config:
        config.transform_input = saved.get("transform_input")
    now = json.loads(config.to_json_best_effort())
    changed = [
        f"{name}: {saved[name]} -> {value}"
        for name, value in now.items()
        if name in saved and saved[name] != value
    ]
    if changed:
        _say(f"resuming with another config than the run began with: {', '.join(changed)}")


def _check_notes(saved: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if saved[name] != value:
            raise ValueError(
                f"the run in this workdir has {name}={saved[name]}, not {value}: use that, or another workdir"
            )


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)
