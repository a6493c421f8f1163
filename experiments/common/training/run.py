"""A run from its config: data, network, optimizer, steps, and what it leaves in its workdir."""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

import cbp_jax
from common.config import ConfigError
from common.input.open import open_data
from common.report import deploy
from common.report.figures import draw_run
from common.report.workdir import (
    FULL_PRECISION,
    Summary,
    Workdir,
    float32_bytes,
    packed_bytes,
)
from common.training import disk, lock, mesh
from common.training.batch_statistics import make_reestimate
from common.training.best import Best
from common.training.checkpoints import Checkpoints, newest_step
from common.training.distillation import distillation
from common.training.health import check_finite, faults
from common.training.loop import Meter, Stopped, StopRequest
from common.training.metrics import (
    deployed_state,
    epoch_row,
    evaluated_weights,
    relative_weights,
)
from common.training.preflight import preflight
from common.training.restore import Record, restore_state, save_state
from common.training.settle import (
    check_resumable,
    is_constrained,
    is_finished,
    saved_config,
    settle,
)
from common.training.setup import (
    Evaluate,
    Setup,
    initial_state,
    make_evaluation,
    make_setup,
    on_device,
    read_teacher,
)
from common.training.step import TrainState, make_train_step, zero_sums

PyTree = Any
# Histograms show the weights once CFS / scale is this share of what it was after the first epoch.
_MIDWAY = 0.5


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> Summary:
    """Runs the config's phase to its end, from the newest checkpoint in the workdir if any.

    Args:
      config: of `common.config`.
      workdir: the run's folder; with several hosts, one that all of them see.

    Returns:
      The summary, which is in the workdir too; a run that finished before is left as it is.

    Raises:
      Stopped: after SIGTERM or Ctrl-C, once the state is saved; the same call then resumes.
      ConfigError: if a field of the config makes no sense, or does not fit the run in the workdir,
        or another run uses the workdir.
      FileNotFoundError: if the data or the pre-trained weights do not exist.
      DiskError: if the disk is full, or the workdir read-only.
      MemoryError: if a step does not fit the device.
      FloatingPointError: if the loss, a weight or a multiplier is not finite; the checkpoints stay
        as they are.
    """
    with disk.explained(workdir), lock.locked(workdir):
        return _train_and_evaluate(config, workdir)


def _train_and_evaluate(config: ml_collections.ConfigDict, workdir: Path) -> Summary:
    started = time.perf_counter()
    saved, newest = saved_config(workdir), newest_step(workdir / "checkpoints")
    resumes = newest is not None
    config = settle(config, saved if resumes else None)
    if newest is not None and is_finished(workdir, newest, saved, config):
        log(f"{_title(config)}: finished before, see {workdir}")
        return Summary.read(workdir)
    if resumes and (changes := check_resumable(saved, config)):
        log(f"resuming with another config (saved -> asked): {changes}")

    checkpoints = Checkpoints(workdir / "checkpoints", config.keep_checkpoints)
    best = Best(workdir, config, resumes) if config.keep_best else None
    loader = open_data(config)
    setup = make_setup(config, loader, load_weights=not resumes)
    state, shardings = initial_state(setup, config.seed)
    train_step = make_train_step(
        setup.network.graphdef,
        setup.optimizer,
        setup.weights_fn,
        loader.train_preprocess,
        shardings,
        distillation(config),
    )
    teacher = read_teacher(config, setup.mesh)
    evaluate = make_evaluation(setup, loader)
    reestimate = make_reestimate(
        setup.network.graphdef, setup.deployed_fn, loader.train_preprocess, shardings
    )

    disk.check_space(workdir, state, 3 if best else 2)
    record = Record(loader.train_images, setup.steps_per_epoch)
    if resumes:
        state, record = _resumed(checkpoints, state, record, setup.total_steps)
        if best:
            best.restore(state)
    step = sound = int(state.step)
    check_finite(state, sound)
    log(
        f"{_title(config)}: {loader.train_images:,} training and {loader.eval_images:,} validation "
        f"images; step {step:,} of {setup.total_steps:,}"
    )
    # An epoch that has ended may not be measured yet.
    measured = step - 1 if int(state.sums.steps) else step
    folder = Workdir(workdir, measured if resumes else None, writes=jax.process_index() == 0)
    folder.write_config(config)
    stream = batches = on_device(loader.train(step), setup.mesh)

    def now() -> Record:
        return record._replace(seconds=record.seconds + time.perf_counter() - started)

    def save() -> None:
        """Saves the state; one that is not finite must not evict good checkpoints."""
        check_finite(state, sound)
        if best:  # the run would resume from after it
            best.wait()
        disk.check_space(checkpoints.folder, state)
        save_state(checkpoints, state, now())

    warned: set[str] = set()
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(best) if best else contextlib.nullcontext(),
        contextlib.closing(folder),
        contextlib.closing(stream),
    ):
        if config.preflight:
            first, train_step, line = preflight(train_step, state, stream, evaluate, teacher)
            batches = itertools.chain([first], stream)
            log(f"preflight: {line}")
        if config.phase == "post_train" and not resumes:
            accuracy = evaluate(state.params, state.batch_stats)
            record = record._replace(full_precision_top1=accuracy["top1"])
            if loader.test:
                accuracy = evaluate(state.params, state.batch_stats, test=True)
                record = record._replace(full_precision_test_top1=accuracy["top1"])
            if setup.constrained:
                folder.save_weights("before", relative_weights(state))

        with Meter(config, step, setup.total_steps) as meter, StopRequest() as stop:
            while True:
                # Also where a process ended between an epoch's last step and its evaluation.
                if step % setup.steps_per_epoch == 0 and int(state.sums.steps):
                    check_finite(state, sound)
                    sound = step
                    row = epoch_row(state, setup, evaluate, meter.images_per_second())
                    folder.append_metrics(row)
                    meter.end_epoch(row)
                    for name, fault in faults(state, row, setup).items():
                        if name not in warned:
                            log(f"warning, epoch {row['epoch']}: {name}: {fault}")
                            warned.add(name)
                    if best:
                        best.offer(state, now(), row)
                    if setup.constrained:
                        deployed = deployed_state(state, setup)
                        record = _keep_midway(record, row, deployed, folder)
                        if config.keep_weights:
                            folder.save_weights(f"step{step}", relative_weights(deployed))
                    state = _reset_sums(state)
                if step == setup.total_steps or stop.after(step):
                    break
                try:
                    batch = next(batches)
                except Exception:
                    if stop.asked:  # whoever ends this process may have ended its workers too
                        break
                    raise
                state, loss = train_step(state, batch, *teacher)
                step += 1
                meter.step(loss)
                if not meter.finite:
                    check_finite(state, sound)
                if step == setup.total_steps and config.reestimate_batches:
                    state = reestimate(state, itertools.islice(batches, config.reestimate_batches))
                if _checkpoint_is_due(config, setup, step):  # first: the evaluation takes a while
                    save()
                    sound = step
            if step < setup.total_steps or stop.asked:
                save()
                checkpoints.wait()
                at = f"step {step:,} of {setup.total_steps:,}"
                log(f"stopped at {at}, saved; rerun the same command to resume")
                raise Stopped(stop.status)

    on_test = {}
    if loader.test:
        on_test = evaluate(evaluated_weights(state, setup), state.batch_stats, test=True)
    summary = _summarize(config, row, now(), state, on_test)
    summary = dataclasses.replace(summary, best=best.figures if best else None)
    if setup.constrained:
        deployed = deployed_state(state, setup)
        summary = _deploy(summary, folder, deployed, setup, evaluate)
        after = relative_weights(deployed)
        if jax.process_index() == 0 and config.figures:
            draw_run(folder, summary, after, record.midway)
    folder.write_summary(summary)
    return summary


def log(text: str) -> None:
    """Prints, on the first host."""
    if jax.process_index() == 0:
        print(text, flush=True)


def _title(config: ml_collections.FrozenConfigDict) -> str:
    if not is_constrained(config):
        return f"{config.experiment}, {FULL_PRECISION}"
    return f"{config.experiment}, {config.constraint}, {config.method}"


def _resumed(
    checkpoints: Checkpoints, like: TrainState, asked: Record, total_steps: int
) -> tuple[TrainState, Record]:
    """The newest readable state, if its schedule is the one asked for and has not passed."""
    state, record = restore_state(checkpoints, like, put_aside=True)  # type: ignore[misc]
    for name in ("images", "steps_per_epoch"):
        saved, value = getattr(record, name), getattr(asked, name)
        if saved != value:
            raise ConfigError(
                f"the run in this workdir has {name}={saved}, not {value}: use that, or another "
                "--workdir"
            )
    step, measured = int(state.step), int(state.sums.steps) == 0
    if step > total_steps or (step == total_steps and measured):
        raise ConfigError(
            f"the run in this workdir has taken {step} steps, and its config asks for "
            f"{total_steps}: raise --config.epochs"
        )
    return state, record


def _checkpoint_is_due(config: ml_collections.FrozenConfigDict, setup: Setup, step: int) -> bool:
    return (
        step == setup.total_steps
        or step % (config.checkpoint_epochs * setup.steps_per_epoch) == 0
        or (config.checkpoint_steps > 0 and step % config.checkpoint_steps == 0)
    )


def _reset_sums(state: TrainState) -> TrainState:
    """Starts the sums of the next epoch."""
    sums = jax.tree.map(
        lambda zero, old: jax.device_put(zero, old.sharding), zero_sums(), state.sums
    )
    return state._replace(sums=sums)


def _keep_midway(record: Record, row: dict[str, Any], state: TrainState, folder: Workdir) -> Record:
    """Keeps the weights for the histograms at the epoch where half of the way is covered."""
    if record.first_cfs is None:
        return record._replace(first_cfs=row["cfs_relative"])
    if record.midway is not None or row["cfs_relative"] > _MIDWAY * record.first_cfs:
        return record
    folder.save_weights("midway", relative_weights(state))
    window = f", g = {row['window']:.3g}" if "window" in row else ""
    return record._replace(midway=f"epoch {row['epoch']}{window}")


def _summarize(
    config: ml_collections.FrozenConfigDict,
    row: dict[str, Any],
    record: Record,
    state: TrainState,
    on_test: Mapping[str, float],
) -> Summary:
    post_train, constrained = config.phase == "post_train", is_constrained(config)
    float32 = float32_bytes(state.params)
    return Summary(
        experiment=config.experiment,
        constraint=config.constraint if constrained else FULL_PRECISION,
        method=config.method if post_train else "",
        seed=config.seed,
        full_precision_top1=record.full_precision_top1 if post_train else row["top1"],  # type: ignore[arg-type]
        top1=row["top1"],
        top5=row["top5"],
        eval_loss=row["eval_loss"],
        cfs=row.get("cfs", 0.0),
        cfs_relative=row.get("cfs_relative", 0.0),
        bits_per_weight=cbp_jax.get_constraint(config.constraint).bits if constrained else 32,
        bytes_packed=packed_bytes(state.params, state.opt_state) if constrained else float32,
        bytes_float32=float32,
        seconds=record.seconds,
        test_top1=on_test.get("top1"),
        test_loss=on_test.get("loss"),
        full_precision_test_top1=(
            record.full_precision_test_top1 if post_train else on_test.get("top1")
        ),
        multipliers=row.get("multiplier"),
        distilled=distillation(config) is not None,
    )


def _deploy(
    summary: Summary, folder: Workdir, state: TrainState, setup: Setup, evaluate: Evaluate
) -> Summary:
    """Writes the packed file, and evaluates what is read back from it."""
    path = folder.path / deploy.PACKED_FILE
    whole = jax.jit(lambda tree: tree, out_shardings=mesh.replicated(setup.mesh))
    params, batch_stats, opt_state = jax.device_get(
        whole((state.params, state.batch_stats, state.opt_state))
    )
    if jax.process_index() == 0:
        packed = deploy.save(path, params, batch_stats, opt_state, round=True)
        log(f"packed: {deploy.rounding_line(packed)}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("packed file")
    weights = jax.tree.map(np.asarray, deploy.load(path, params, batch_stats))
    return dataclasses.replace(
        summary, bytes_file=path.stat().st_size, file_top1=evaluate(*weights)["top1"]
    )
