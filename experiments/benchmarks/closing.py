"""How the constraint closes with the learning rate, the multiplier rate and the window growth.

    cd experiments && python -m benchmarks.closing

Trains an MLP on scikit-learn's digits from the same pre-trained weights, for the same number of
steps; the schedule has 60 multiplier updates. A multiplier rate of 0 is the straight-through
estimator alone. Nothing is timed. Writes `results/closing.json` and `.md`.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from benchmarks import timing
from common.input.in_memory import load_digits
from common.report.tables import format_table

import cbp_jax

PyTree = Any

UPDATES = 60
BATCH = 32
WIDTHS = (64, 32, 32, 32, 10)
CONSTRAINTS = ("binary", "ternary")
RATES = (0.0, 1e-4, 1e-3, 1e-2)
GROWTHS: dict[str, Callable[[jax.Array], jax.Array] | None] = {
    "+10": None,  # the paper's
    "×1.5": lambda g: jnp.where(g < 10, g + 1, 1.5 * g),
}
OPTIMIZERS: dict[str, Callable[[int], optax.GradientTransformation]] = {
    "SGD, constant": lambda steps: optax.sgd(1e-2, momentum=0.9),
    "SGD, cosine": lambda steps: optax.sgd(optax.cosine_decay_schedule(1e-2, steps), momentum=0.9),
    "AdamW, constant": lambda steps: optax.adamw(1e-3),
    "AdamW, cosine": lambda steps: optax.adamw(optax.cosine_decay_schedule(1e-3, steps)),
}

_STEPS = flags.DEFINE_integer("steps", 3000, "Steps per run.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs per setting.")


class Digits(NamedTuple):
    """Images as vectors."""

    x: jax.Array
    y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


def load() -> Digits:
    train_x, train_y, test_x, test_y = map(jnp.asarray, load_digits())
    return Digits(train_x.reshape(-1, WIDTHS[0]), train_y, test_x.reshape(-1, WIDTHS[0]), test_y)


def initial(key: jax.Array) -> PyTree:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return {
        f"layer{i}": {
            "kernel": jax.random.normal(keys[i], (n, m)) * jnp.sqrt(2 / n),
            "bias": jnp.zeros(m),
        }
        for i, (n, m) in enumerate(itertools.pairwise(WIDTHS))
    }


def forward(params: PyTree, x: jax.Array) -> jax.Array:
    for layer in list(params.values())[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    head = list(params.values())[-1]
    return x @ head["kernel"] + head["bias"]


def accuracy(digits: Digits, params: PyTree) -> jax.Array:
    return jnp.mean(jnp.argmax(forward(params, digits.test_x), axis=1) == digits.test_y)


def train(
    digits: Digits,
    params: PyTree,
    optimizer: optax.GradientTransformationExtraArgs,
    steps: int,
    key: jax.Array,
    constrained: bool,
) -> tuple[PyTree, dict[str, jax.Array]]:
    """Trains for some steps.

    Returns:
      The weights, and of a constrained run CFS / scale on the way and the accuracies at the end.
    """

    def step(carry: PyTree, index: jax.Array) -> tuple[PyTree, jax.Array]:
        params, state = carry

        def loss_fn(weights: PyTree) -> jax.Array:
            logits = forward(weights, digits.x[index])
            return optax.softmax_cross_entropy_with_integer_labels(logits, digits.y[index]).mean()

        weights = cbp_jax.quantize(params, state) if constrained else params
        loss, grads = jax.value_and_grad(loss_fn)(weights)
        updates, state = optimizer.update(grads, state, params, value=loss)
        params, score = optax.apply_updates(params, updates), loss
        if constrained:
            score = cbp_jax.constraint_failure_score(params, state, relative=True)
        return (params, state), score

    batches = jax.random.randint(key, (steps, BATCH), 0, len(digits.y))
    (params, state), scores = jax.lax.scan(step, (params, optimizer.init(params)), batches)
    if not constrained:
        return params, {}
    quarters = [steps * n // 4 - 1 for n in (1, 2, 3, 4)]
    ends = {
        "quantized": accuracy(digits, cbp_jax.quantize(params, state)),
        "latent": accuracy(digits, params),
    }
    return params, ends | {"cfs": scores[jnp.array(quarters)]}


def measure(steps: int, seeds: int) -> list[dict[str, Any]]:
    """Returns one row per setting, with one value per seed."""
    digits, keys = load(), jax.random.split(jax.random.key(0), (2, seeds))

    def pretrain(key: jax.Array) -> PyTree:
        adam = optax.with_extra_args_support(optax.adam(3e-3))
        return train(digits, initial(key), adam, max(steps // 2, 1), key, False)[0]

    pretrained = jax.jit(jax.vmap(pretrain))(keys[0])
    before = jax.vmap(lambda params: accuracy(digits, params))(pretrained)
    rows = []
    mask = cbp_jax.select(exclude=["layer0/.*", f"layer{len(WIDTHS) - 2}/.*"])
    for (name, make), growth, constraint, rate in itertools.product(
        OPTIMIZERS.items(), GROWTHS, CONSTRAINTS, RATES
    ):
        if not rate and growth != next(iter(GROWTHS)):
            continue  # without multipliers the window changes nothing
        link = cbp_jax.cbp(
            constraint,
            steps_per_epoch=max(steps // UPDATES, 1),
            patience=1,
            multiplier_learning_rate=rate,
            mask=mask,
            window_growth=GROWTHS[growth],
        )
        optimizer = optax.chain(link, make(steps))

        def run(params: PyTree, key: jax.Array, optimizer: Any = optimizer) -> dict[str, jax.Array]:
            return train(digits, params, optimizer, steps, key, True)[1]

        ends = jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(pretrained, keys[1]))
        rows.append(
            {
                "optimizer": name,
                "growth": growth if rate else "",
                "constraint": constraint,
                "rate": rate,
                "full_precision": before.tolist(),
                "quantized": ends["quantized"].tolist(),
                "latent": ends["latent"].tolist(),
                "cfs": ends["cfs"].mean(axis=0).tolist(),
            }
        )
    return rows


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Formats a row of the table: CFS / scale after each quarter, and accuracies at the end."""
    accuracies = [f"{100 * statistics.mean(row[end]):.1f}" for end in ("quantized", "latent")]
    return (
        row["optimizer"],
        row["constraint"],
        f"{row['rate']:.0e}" if row["rate"] else "STE",
        row["growth"],
        *(f"{score:.1e}" for score in row["cfs"]),
        *accuracies,
    )


HEADER = (
    "optimizer",
    "constraint",
    "multiplier rate",
    "window",
    "CFS / scale at 1/4",
    "1/2",
    "3/4",
    "end",
    "quantized, %",
    "latent, %",
)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    return format_table(HEADER, [cells(row) for row in rows])


def as_markdown(results: Mapping[str, Any]) -> str:
    """Formats the results as a page."""
    before = 100 * statistics.mean(results["runs"][0]["full_precision"])
    return (
        "# How the constraint closes\n"
        f"An MLP of widths {', '.join(map(str, WIDTHS))} on scikit-learn's digits, with its inner "
        f"layers constrained; {results['steps']:,} steps of {BATCH} images and {UPDATES} "
        f"multiplier updates; means over {results['seeds']} seeds; {timing.described(results)}. "
        f"Full precision before: {before:.1f}%. The window g grows by 1 up to 10, then by 10 (the "
        "paper's rule) or by half. The last two columns are test accuracies of the quantized "
        "weights, and of the latent weights without a quantizer. By "
        "`python -m benchmarks.closing`.\n\n"
        f"{table(results['runs'])}\n"
    )


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    steps, seeds = _STEPS.value, _SEEDS.value
    results = timing.environment() | {"steps": steps, "seeds": seeds, "runs": measure(steps, seeds)}
    timing.write("closing", results, as_markdown(results))


if __name__ == "__main__":
    app.run(main)
