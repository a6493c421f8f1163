"""What the loop over steps needs: requests to stop, and a progress bar that knows the speed."""

import collections
import math
import signal
import time
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils

from common.training import progress

# Steps queued on the device: enough to keep it busy, few enough to stop soon.
_STEPS_AHEAD = 8


class Stopped(SystemExit):
    """The run was asked to stop and has saved its state; the exit status is 130 after Ctrl-C."""


class StopRequest:
    """Whether the run was asked to stop, by SIGTERM or Ctrl-C; a second Ctrl-C ends the process.

    Several hosts agree on the step after which they stop. There JAX itself listens for SIGTERM, and
    Ctrl-C raises KeyboardInterrupt as usual, without saving.
    """

    def __init__(self) -> None:
        self._by: int | None = None

    def __enter__(self) -> "StopRequest":
        signals = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._ask) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        del frame
        self._by = number
        if number == signal.SIGINT:
            # Not KeyboardInterrupt, which would wait for a call that hangs.
            signal.signal(number, signal.SIG_DFL)

    def after(self, step: int) -> bool:
        """Whether to stop after this step; call it after each."""
        if jax.process_count() == 1:
            return self.asked
        return multihost_utils.reached_preemption_sync_point(step)

    @property
    def asked(self) -> bool:
        return self._by is not None

    @property
    def status(self) -> int:
        """The exit status: 128 + 2 after Ctrl-C, else 0."""
        return 128 + signal.SIGINT if self._by == signal.SIGINT else 0


class Meter:
    """Moves the progress bar, and measures the speed of an epoch without its evaluation.

    Args:
      config: of the run.
      step: the first one.
      total_steps: of the whole run.
    """

    def __init__(self, config: ml_collections.FrozenConfigDict, step: int, total_steps: int):
        self._losses: collections.deque[jax.Array] = collections.deque()
        self.finite = True  # whether every loss that it waited for was
        self._batch_size, self._with_window = config.batch_size, config.method == "cbp"
        self._restart()
        total, done = total_steps * self._batch_size, step * self._batch_size
        shown = jax.process_index() == 0
        self._bar = progress.images(total, done, progress.description(config), shown)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *error: object) -> None:
        self._drain()
        self._bar.close()

    def _restart(self) -> None:
        self._started, self._steps = time.perf_counter(), 0

    def step(self, loss: jax.Array) -> None:
        """Counts a step, and waits if too many are queued."""
        self._steps += 1
        self._losses.append(loss)
        if len(self._losses) > _STEPS_AHEAD:
            self.finite &= math.isfinite(self._losses.popleft())  # which waits for it
            self._bar.update(self._batch_size)

    def images_per_second(self) -> float:
        """The speed since the epoch, or the run, began; NaN if there was no step."""
        self._drain()
        seconds = time.perf_counter() - self._started
        return self._steps * self._batch_size / seconds if self._steps else math.nan

    def end_epoch(self, row: dict[str, Any]) -> None:
        """Shows an epoch's figures."""
        self._bar.set_postfix_str(progress.figures(row, self._with_window))
        self._restart()

    def _drain(self) -> None:
        jax.block_until_ready(list(self._losses))
        self._bar.update(self._batch_size * len(self._losses))
        self._losses.clear()
