"""The loop of a long run: steps, epochs, checkpoints, and a clean end when it is told to stop."""

import collections
import math
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from common.input.batch import Batch
from common.training import metrics as monitor
from common.training import progress
from common.training import step as train
from common.training.checkpoints import Checkpoints
from common.training.step import TrainState, TrainStep

# Steps that may be on their way to the device: enough to keep it busy, few enough to stop soon.
_STEPS_AHEAD = 8


class Plan(NamedTuple):
    """What a loop does."""

    description: str
    steps_per_epoch: int
    total_steps: int
    batch_size: int
    checkpoint_steps: int  # between two checkpoints; 0: at the end of every epoch only
    # From the state after an epoch's last step, what `metrics.jsonl` says of it beyond the loop's
    # own figures.
    measure: Callable[[TrainState], dict[str, Any]]
    on_epoch: Callable[[dict[str, Any]], None]
    figures: Callable[[dict[str, Any]], str]  # what the progress bar says of an epoch
    notes: Callable[[], dict[str, Any]]  # what is saved along with the state, as JSON


class Ending(NamedTuple):
    """How `run` ended; the state is saved in any case."""

    state: TrainState
    finished: bool  # whether the last step was reached; if not, the run was asked to stop
    interrupted: bool  # asked to stop by Ctrl-C


class StopRequest:
    """Whether the run was asked to stop, by SIGTERM or by Ctrl-C; a second Ctrl-C ends the process
    at once.

    Several hosts agree on the step after which they stop. There JAX itself listens for SIGTERM, and
    Ctrl-C does what it does to any
    Python: it ends this process without saving.
    """

    def __init__(self) -> None:
        self._by: int | None = None
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._ask) for number in signals}

    def close(self) -> None:
        """The signals do again what they did before."""
        for number, handler in self._before.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        self._by = number
        if number == signal.SIGINT:
            signal.signal(
                number, signal.SIG_DFL
            )  # not KeyboardInterrupt, which would wait for a call that hangs

    def after(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after each."""
        return (
            self.asked
            if jax.process_count() == 1
            else multihost_utils.reached_preemption_sync_point(step)
        )

    @property
    def asked(self) -> bool:
        return self._by is not None

    @property
    def interrupted(self) -> bool:
        """Whether it was by Ctrl-C."""
        return self._by == signal.SIGINT


def run(
    plan: Plan,
    state: TrainState,
    step_fn: TrainStep,
    batches: Iterator[Batch],
    checkpoints: Checkpoints,
) -> Ending:
    """Trains from the state's step to the last one.

    Args:
      plan: what to do.
      state: it is donated.
      step_fn: of `train.make_train_step`.
      batches: from the state's step on.
      checkpoints: where the state is saved.

    Raises:
      FloatingPointError: if the loss was not finite since the last checkpoint; the checkpoints stay
        as they are.
    """
    stop, step = StopRequest(), int(state.step)
    meter = _Meter(plan, step)
    try:
        if (
            int(state.sums.steps) and step % plan.steps_per_epoch == 0
        ):  # stopped between an epoch's last step and its measurement
            state = _end_epoch(plan, state, step, meter)
        while step < plan.total_steps and not stop.after(step):
            try:
                batch = next(batches)
            except Exception:
                if stop.asked:  # whoever ended this process may have ended its workers too
                    break
                raise
            state, loss = step_fn(state, batch)
            step += 1
            meter.step(loss)
            at_end = step % plan.steps_per_epoch == 0
            if at_end or (plan.checkpoint_steps and step % plan.checkpoint_steps == 0):
                _save(plan, checkpoints, step, state)
            if at_end:  # after the checkpoint is under way: there may be no time for it later
                state = _end_epoch(plan, state, step, meter)
        finished = step >= plan.total_steps
        if not finished:
            _save(plan, checkpoints, step, state)
            checkpoints.wait()
        return Ending(state, finished, stop.interrupted and not finished)
    finally:
        meter.close()
        stop.close()


def _end_epoch(plan: Plan, state: TrainState, step: int, meter: "_Meter") -> TrainState:
    """Measures, and starts the sums of the next epoch."""
    sums = jax.device_get(state.sums)
    rate = meter.images_per_second()
    row = {
        "epoch": step // plan.steps_per_epoch,
        "step": step,
        "loss": float(sums.loss) / int(sums.steps),
    }
    row |= plan.measure(state)
    row |= {"images_per_second": rate, "unreadable": int(sums.unreadable)}
    plan.on_epoch(row)
    meter.end_epoch(row)
    fresh = jax.tree.map(
        lambda zero, old: jax.device_put(zero, old.sharding), train.zero_sums(), state.sums
    )
    return state._replace(sums=fresh)


def _check_finite(state: TrainState, step: int) -> None:
    """What is not finite must not push the sound checkpoints out."""
    if not (math.isfinite(float(state.sums.loss)) and bool(monitor.all_finite(state.params))):
        raise FloatingPointError(
            f"the loss or a weight is not finite at step {step}; the checkpoints are from before that. "
            "Lower --config.learning_rate or --config.pretrain_learning_rate, or use --config.dtype=float32"
        )


def _save(plan: Plan, checkpoints: Checkpoints, step: int, state: TrainState) -> None:
    _check_finite(state, step)
    weights = {"params": state.params, "batch_stats": state.batch_stats}
    rest = {"step": state.step, "opt_state": state.opt_state, "key": state.key, "sums": state.sums}
    checkpoints.save(step, {"weights": weights, "rest": rest}, plan.notes())


def restore(
    checkpoints: Checkpoints, like: TrainState, put_aside: bool = False
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest state that `run` saved and that can be read, with its notes; None if there is none. As `restore_newest`."""
    weights = {"params": like.params, "batch_stats": like.batch_stats}
    rest = {"step": like.step, "opt_state": like.opt_state, "key": like.key, "sums": like.sums}
    found = checkpoints.restore_newest({"weights": weights, "rest": rest}, put_aside)
    if found is None:
        return None
    _, trees, notes = found
    return TrainState(**trees["weights"], **trees["rest"]), notes


class _Meter:
    """Moves the progress bar, and knows how fast the epoch goes without its evaluation."""

    def __init__(self, plan: Plan, start: int):
        self._losses: collections.deque[jax.Array] = collections.deque()
        self._batch_size, self._figures = plan.batch_size, plan.figures
        self._restart()
        total, done = plan.total_steps * plan.batch_size, start * plan.batch_size
        self._bar = progress.images(total, done, plan.description, shown=jax.process_index() == 0)

    def _restart(self) -> None:
        self._started, self._steps = time.perf_counter(), 0

    def step(self, loss: jax.Array) -> None:
        self._steps += 1
        self._losses.append(loss)
        if len(self._losses) > _STEPS_AHEAD:
            self._losses.popleft().block_until_ready()
            self._bar.update(self._batch_size)

    def images_per_second(self) -> float:
        """Since the epoch, or the run, began; called when the device has finished the epoch. NaN if there was no step."""
        return (
            self._steps * self._batch_size / (time.perf_counter() - self._started)
            if self._steps
            else math.nan
        )

    def end_epoch(self, row: dict[str, Any]) -> None:
        self._drain()
        self._bar.set_postfix_str(self._figures(row))
        self._restart()

    def _drain(self) -> None:
        self._bar.update(self._batch_size * len(self._losses))
        self._losses.clear()

    def close(self) -> None:
        self._drain()
        self._bar.close()
