"""Images per second of a whole training step: plain SGD with momentum against CBP, in one run.

    cd experiments
    python -m benchmarks.train_step  # ResNet-50, batch 256, bfloat16: for an accelerator
    python -m benchmarks.train_step --network=resnet20 --num_classes=10 --image_size=32 \\
        --batch_size=64 --dtype=float32 --steps=3 --repetitions=5

The batch is on the device; the candidates take turns, so that other load affects them all, and the
medians count. Writes `results/train_step_NETWORK.json` and `.md`.
"""

import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from benchmarks import timing
from common import models
from common.config import base_config
from common.input import augment
from common.input.batch import Batch
from common.report.tables import format_table
from common.training import optimizers, preflight
from common.training.methods import Method, make_method
from common.training.step import TrainState, init_state, latent, make_train_step
from flax import nnx

PLAIN = "plain"
METHODS = (PLAIN, "binary", "ternary", "one_bit_shift", "two_bit_shift")

_NETWORK = flags.DEFINE_string("network", "resnet50", "A network of common.models.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Images per step.")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 224, "Pixels each way.")
_NUM_CLASSES = flags.DEFINE_integer("num_classes", 1000, "Logits.")
_DTYPE = flags.DEFINE_string("dtype", "bfloat16", "Of the activations.")
_STEPS = flags.DEFINE_integer("steps", 20, "Steps timed together.")
_REPETITIONS = flags.DEFINE_integer("repetitions", 7, "Turns of each candidate.")


class Candidate:
    """A compiled step with a state of its own."""

    def __init__(self, method: str, batch: Mapping[str, jax.Array]):
        config = base_config("train_step", _NETWORK.value)
        config.constraint, config.learning_rate = "binary" if method == PLAIN else method, 1e-3
        config.phase = "pretrain" if method == PLAIN else "post_train"
        dtype = jnp.dtype(_DTYPE.value)
        model = models.create(_NETWORK.value, _NUM_CLASSES.value, dtype=dtype, rngs=nnx.Rngs(0))
        graphdef, params, batch_stats = models.split_model(model)
        if method == PLAIN:
            made = Method(optimizers.pretraining(config, 1000), latent, latent)
        else:
            made = make_method(config, 1000, model.constrained)

        def preprocess(batch: Batch, key: jax.Array) -> jax.Array:
            del key
            return augment.preprocess(batch, dtype)

        self._state = init_state(params, batch_stats, made.optimizer)
        step: Any = make_train_step(graphdef, made.optimizer, made.weights_fn, preprocess)
        self._step = step.lower(self._state, batch).compile()
        self.bytes = preflight.memory_needed(self._step)
        self._batch = batch

    def __call__(self) -> TrainState:
        for _ in range(_STEPS.value):
            self._state, _ = self._step(self._state, self._batch)
        return self._state


def measure() -> dict[str, Any]:
    """Measures images per second of each method, its time relative to plain, and its memory."""
    size, count = _IMAGE_SIZE.value, _BATCH_SIZE.value
    rng = np.random.default_rng(0)
    batch = {
        "image": jnp.asarray(rng.integers(0, 256, (count, size, size, 3), np.uint8)),
        "label": jnp.asarray(rng.integers(0, _NUM_CLASSES.value, count, np.int32)),
        "jitter": jnp.asarray(rng.uniform(0.8, 1.2, (count, 3)).astype(np.float32)),
    }
    candidates = {method: Candidate(method, batch) for method in METHODS}
    seconds = timing.take_turns(candidates, _REPETITIONS.value)
    return timing.environment() | {
        "network": _NETWORK.value,
        "batch_size": count,
        "image_size": size,
        "dtype": _DTYPE.value,
        "steps": _STEPS.value,
        "repetitions": _REPETITIONS.value,
        "images_per_second": {
            method: count * _STEPS.value / statistics.median(times)
            for method, times in seconds.items()
        },
        "time_over_plain": {method: timing.ratio(seconds, method, PLAIN) for method in seconds},
        "gib": {method: candidate.bytes / 2**30 for method, candidate in candidates.items()},
    }


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    rows = [
        (
            method,
            f"{rate:.1f}",
            f"{results['time_over_plain'][method]:.3f}",
            f"{results['gib'][method]:.2f}",
        )
        for method, rate in results["images_per_second"].items()
    ]
    table = format_table(("step", "images/s", "time over plain", "GiB"), rows)
    return (
        f"# Training step of {results['network']}\n"
        f"Batch {results['batch_size']} of {results['image_size']} x {results['image_size']} "
        f"pixels, {results['dtype']}, {timing.described(results)}; medians of "
        f"{results['repetitions']} turns of {results['steps']} steps. `plain` is SGD with momentum "
        "and weight decay in full precision. Memory is the peak of the compiled step. By "
        "`python -m benchmarks.train_step`.\n\n"
        f"{table}\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    results = measure()
    timing.write(f"train_step_{_NETWORK.value}", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
