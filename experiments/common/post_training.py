"""The main job: a pre-trained network, then for each constraint CBP beside the straight-through estimator alone."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import nnx

import cbp_jax
from common import models
from common.input.in_memory import Dataset, padded_batches, shuffled_batches
from common.report import deploy, figures
from common.report import workdir as report
from common.training import checkpoints, optimizers, progress
from common.training import metrics as monitor
from common.training import step as train

PyTree = Any
CONSTRAINTS = ("binary", "ternary", "one_bit_shift", "two_bit_shift")
# The weights are shown midway when CFS / scale has come down to this share of what it was after the
# first epoch.
_MIDWAY = 0.5


class Job(NamedTuple):
    """What all the runs of an experiment have in common."""

    experiment: str
    config: ml_collections.ConfigDict
    dataset: Dataset
    graphdef: nnx.GraphDef
    mask: Callable[[PyTree], PyTree]


class EpochLog(NamedTuple):
    """What the loop knows at the end of an epoch; the state is valid until the next log is asked for (it is donated then)."""

    epoch: int  # counted from 1
    state: train.TrainState
    loss: float
    images_per_second: float


class Outcome(NamedTuple):
    """Where a post-training ended, and how it got there."""

    state: train.TrainState
    rows: list[dict[str, float]]  # one per epoch, as in metrics.jsonl
    snapshots: dict[str, dict[str, np.ndarray]]  # moment -> layer -> weights in units of the scale


def run(
    experiment: str,
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike[str],
    dataset: Dataset,
    model: models.SmallConvNet | models.SmallMLP,
) -> list[report.Summary]:
    """Pre-trains, post-trains under the constraint of the config or under all four, and prints the
    table.

    Args:
      experiment: its name, for the summary.
      config: the fields of `common.settings.small_experiment`.
      workdir: the run's folder; with `constraint="all"`, one folder below it for each.
      dataset: what to train and test on.
      model: a network with fresh weights.

    Returns:
      One summary per constraint.
    """
    names = (
        CONSTRAINTS
        if config.constraint == "all"
        else (cbp_jax.get_constraint(config.constraint).name,)
    )
    root = report.Workdir(workdir)
    root.write_config(config)
    print(
        f"{experiment}: {len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images"
    )

    job, params, batch_stats = make_job(experiment, config, dataset, model)
    pretrained, full_precision = pretrain(job, params, batch_stats)
    checkpoints.save(
        root.checkpoints / "pretrained",
        {"params": pretrained.params, "batch_stats": pretrained.batch_stats},
    )

    summaries = []
    for name in names:
        folder = root if len(names) == 1 else report.Workdir(root.path / name)
        folder.write_config(config)
        summaries.append(compare(job, folder, pretrained, full_precision, name))
    table = report.results_table(summaries)
    (root.path / "table.md").write_text(table + "\n")
    print(f"\n{table}\n\nwritten to {root.path}")
    return summaries


def make_job(
    experiment: str,
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    model: models.SmallConvNet | models.SmallMLP,
) -> tuple[Job, PyTree, PyTree]:
    """What the runs have in common, and the model's parameters and batch statistics."""
    graphdef, params, batch_stats = models.split_model(model)
    return (
        Job(experiment, config, dataset, graphdef, cbp_jax.select(include=model.constrained)),
        params,
        batch_stats,
    )


def pretrain(job: Job, params: PyTree, batch_stats: PyTree) -> tuple[train.TrainState, float]:
    """Trains in full precision: SGD with momentum, cosine to zero. Gives the state and its top-1 accuracy."""
    config = job.config
    steps = config.pretrain_epochs * config.steps_per_epoch
    optimizer = optax.chain(
        optax.add_decayed_weights(
            config.weight_decay, mask=lambda tree: jax.tree.map(lambda w: w.ndim >= 2, tree)
        ),
        optax.sgd(optax.cosine_decay_schedule(config.pretrain_learning_rate, steps), momentum=0.9),
    )
    state = train.init_state(params, batch_stats, optimizer)
    step = train.make_train_step(
        job.graphdef, optax.with_extra_args_support(optimizer), train.latent
    )
    evaluate = train.make_evaluate(job.graphdef)
    with progress.epochs(config.pretrain_epochs, "full precision") as bar:
        for log in _epochs(job, state, step, config.pretrain_epochs, config.seed):
            state = log.state
            bar.set_postfix_str(f"loss {log.loss:.4f}", refresh=False)
            bar.update()
        accuracy = evaluate(state.params, state.batch_stats, test_batches(job))["top1"]
        bar.set_postfix_str(f"loss {log.loss:.4f}, top-1 {accuracy:.2%}")
    return state, accuracy


def compare(
    job: Job,
    folder: report.Workdir,
    pretrained: train.TrainState,
    full_precision: float,
    constraint: str,
) -> report.Summary:
    """Post-trains from the same weights with the straight-through estimator and with CBP, and fills the folder."""
    started = time.perf_counter()
    config = job.config
    # The baseline has what suits it: no multipliers, and a learning rate that falls to zero along a
    # cosine.
    cosine = optax.cosine_decay_schedule(
        config.learning_rate, config.epochs * config.steps_per_epoch
    )
    ste_optimizer = _optimizer(
        job, constraint, cosine, multiplier_optimizer=optax.set_to_zero(), lr_decay=1.0
    )
    ste = post_train(
        job,
        pretrained,
        ste_optimizer,
        f"{constraint} STE",
        lambda row: cosine(row["step"]),
        with_window=False,
    )
    cbp = post_train(
        job,
        pretrained,
        cbp_optimizer(job, constraint),
        f"{constraint} CBP",
        lambda row: (
            config.learning_rate
            * (config.lr_decay if row["window"] >= config.lr_decay_window else 1.0)
        ),
        folder.append_metrics,
    )
    for row in ste.rows:
        folder.append_metrics(row, "metrics_ste.jsonl")
    checkpoints.save(folder.checkpoints / "final", cbp.state)

    title = f"{job.experiment}, {constraint.replace('_', '-')} weights"
    figures.plot_training(
        folder.figures / "training.png", title, cbp.rows, ste.rows, full_precision
    )
    levels = cbp_jax.get_constraint(constraint).levels
    for layer in cbp.snapshots["before"]:
        moments = {moment: weights[layer] for moment, weights in cbp.snapshots.items()}
        path = folder.figures / f"weights_{layer.replace('/', '_')}.png"
        figures.plot_weights(path, f"{title}: {layer}", moments, levels)

    file, state = folder.path / deploy.PACKED_FILE, cbp.state
    packed = deploy.save(file, state.params, state.batch_stats, state.opt_state, round=True)
    print(f"{constraint}: {deploy.rounding_line(packed)}")
    weights, batch_stats = deploy.load(file, state.params, state.batch_stats)
    from_file = accuracy_of(job, weights, batch_stats)
    bytes_packed, bytes_float32 = report.packed_bytes(state.params, state.opt_state)
    summary = report.Summary(
        experiment=job.experiment,
        constraint=constraint,
        seed=config.seed,
        full_precision_top1=full_precision,
        ste_top1=ste.rows[-1]["top1"],
        top1=cbp.rows[-1]["top1"],
        top5=cbp.rows[-1]["top5"],
        cfs=cbp.rows[-1]["cfs"],
        cfs_relative=cbp.rows[-1]["cfs_relative"],
        bits_per_weight=cbp_jax.get_constraint(constraint).bits,
        bytes_packed=bytes_packed,
        bytes_float32=bytes_float32,
        seconds=time.perf_counter() - started,
        bytes_file=file.stat().st_size,
        file_top1=from_file["top1"],
    )
    folder.write_summary(summary)
    return summary


def post_train(
    job: Job,
    pretrained: train.TrainState,
    optimizer: optax.GradientTransformationExtraArgs,
    description: str,
    learning_rate: Callable[[Mapping[str, float]], Any],
    on_epoch: Callable[[dict[str, float]], None] = lambda row: None,
    with_window: bool = True,
) -> Outcome:
    """Trains with the forward pass on quantized weights; accuracy is that of the quantized weights
    after every epoch.

    Args:
      job: of `make_job`.
      pretrained: what it starts from.
      optimizer: of `cbp_optimizer`, for instance.
      description: before the progress bar.
      learning_rate: that of an epoch, from the rest of its row.
      on_epoch: called with each row.
      with_window: whether the window constrains weights, and is shown beside the progress bar.
    """
    config = job.config
    state = train.init_state(pretrained.params, pretrained.batch_stats, optimizer)
    step = train.make_train_step(job.graphdef, optimizer, cbp_jax.quantize)
    evaluate = train.make_evaluate(job.graphdef)
    quantize = jax.jit(cbp_jax.quantize)
    rows: list[dict[str, float]] = []
    snapshots = {"before": monitor.relative_weights(state)}
    with progress.epochs(config.epochs, description) as bar:
        for log in _epochs(job, state, step, config.epochs, config.seed + 1):
            state = log.state
            row = {"epoch": log.epoch, "step": log.epoch * config.steps_per_epoch, "loss": log.loss}
            row |= {name: float(value) for name, value in monitor.cbp_metrics(state).items()}
            row["lagrangian"] /= config.steps_per_epoch
            accuracy = evaluate(
                quantize(state.params, state.opt_state), state.batch_stats, test_batches(job)
            )
            row |= {"top1": accuracy["top1"], "top5": accuracy["top5"]}
            row |= {
                "learning_rate": float(learning_rate(row)),
                "images_per_second": log.images_per_second,
            }
            rows.append(row)
            on_epoch(row)
            if len(snapshots) == 1 and row["cfs_relative"] <= _MIDWAY * rows[0]["cfs_relative"]:
                snapshots[f"midway: epoch {log.epoch}, g = {row['window']:.3g}"] = (
                    monitor.relative_weights(state)
                )
            bar.set_postfix_str(progress.figures(row, with_window), refresh=False)
            bar.update()
    snapshots["after"] = monitor.relative_weights(state)
    return Outcome(state, rows, snapshots)


def restore(
    job: Job, workdir: Path, constraint: str, params: PyTree, batch_stats: PyTree
) -> train.TrainState:
    """The state in which a finished run under a constraint ended.

    Args:
      job: of `make_job`.
      workdir: of the run under this constraint.
      constraint: its name.
      params: give structure and shapes.
      batch_stats: likewise.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged, or of another network or constraint.
    """
    return checkpoints.restore(
        workdir / "checkpoints" / "final",
        train.init_state(params, batch_stats, cbp_optimizer(job, constraint)),
    )


def accuracy_of(job: Job, weights: PyTree, batch_stats: PyTree) -> dict[str, float]:
    """Accuracy on the test images, as `train.make_evaluate` gives it."""
    return train.make_evaluate(job.graphdef)(weights, batch_stats, test_batches(job))


def cbp_optimizer(job: Job, constraint: str) -> optax.GradientTransformationExtraArgs:
    """The paper's recipe, with the settings of the job."""
    options = optimizers.multiplier_options(job.config)
    return _optimizer(
        job, constraint, job.config.learning_rate, lr_decay=job.config.lr_decay, **options
    )


def _optimizer(
    job: Job, constraint: str, learning_rate: optax.ScalarOrSchedule, **options: Any
) -> Any:
    config = job.config
    return cbp_jax.cbp_sgd(
        learning_rate,
        constraint,
        steps_per_epoch=config.steps_per_epoch,
        patience=config.patience,
        weight_decay=config.weight_decay,
        lr_decay_window=config.lr_decay_window,
        window_growth=optimizers.window_growth(config.window_factor),
        mask=job.mask,
        **options,
    )


def _epochs(
    job: Job, state: train.TrainState, step: train.TrainStep, epochs: int, seed: int
) -> Iterator[EpochLog]:
    images, labels = job.dataset.train_images, job.dataset.train_labels
    batches = shuffled_batches(len(labels), job.config.batch_size, seed)
    for epoch in range(1, epochs + 1):
        started, losses = time.perf_counter(), []
        for _ in range(job.config.steps_per_epoch):
            index = next(batches)
            state, loss = step(state, {"image": images[index], "label": labels[index]})
            losses.append(loss)
        mean_loss = float(jnp.mean(jnp.stack(losses)))  # waits for the device
        seen = job.config.steps_per_epoch * job.config.batch_size
        yield EpochLog(epoch, state, mean_loss, seen / (time.perf_counter() - started))


def test_batches(job: Job) -> Iterator[dict[str, np.ndarray]]:
    """Once through the test images."""
    return padded_batches(job.dataset.test_images, job.dataset.test_labels)
