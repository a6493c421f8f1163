"""An optimizer's compiled step, timed without a network around it."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from benchmarks import timing
from common.training import preflight

PyTree = Any


def make_step(optimizer: optax.GradientTransformation, with_value: bool) -> Any:
    """Returns a jitted (params, state, grads, loss) -> (params, state), the first two donated."""
    optimizer = optax.with_extra_args_support(optimizer)

    def step(
        params: PyTree, state: PyTree, grads: PyTree, loss: jax.Array
    ) -> tuple[PyTree, PyTree]:
        extra = {"value": loss} if with_value else {}
        updates, state = optimizer.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


class Step:
    """A compiled step with its own parameters and state; a call takes `count` steps.

    Args:
      optimizer: to be timed.
      params: the initial parameters, which are copied.
      grads: the gradients of every step.
      with_value: whether to pass the loss too.
      count: steps per call.
    """

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: PyTree,
        grads: PyTree,
        with_value: bool,
        count: int,
    ):
        self._params = jax.tree.map(jnp.copy, params)
        self._state = optimizer.init(self._params)
        self._rest = (grads, jnp.float32(1))
        self._count = count
        self.state_bytes = timing.tree_bytes(self._state)
        started = time.perf_counter()
        step = make_step(optimizer, with_value)
        self._step = step.lower(self._params, self._state, *self._rest).compile()
        self.compile_seconds = time.perf_counter() - started
        self.peak_bytes = preflight.memory_needed(self._step)

    def __call__(self) -> PyTree:
        for _ in range(self._count):
            self._params, self._state = self._step(self._params, self._state, *self._rest)
        return self._params, self._state
