"""The methods of post-training: what each optimizes, trains with, and deploys."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

import cbp_jax
from common.training import optimizers, proximal
from common.training.step import WeightsFn, latent

PyTree = Any
StateFn = Callable[[PyTree, optax.OptState], optax.OptState]
# Forward weights of a leaf from latent ones, constraint, scale and step.
_LeafFn = Callable[[jax.Array, cbp_jax.Constraint, jax.Array, jax.Array], jax.Array]


def as_it_is(params: PyTree, opt_state: optax.OptState) -> optax.OptState:
    """Returns the optimizer's state."""
    del params
    return opt_state


class Method(NamedTuple):
    """An optimizer, and the weights that go with its state."""

    optimizer: optax.GradientTransformationExtraArgs
    weights_fn: WeightsFn  # of the forward pass of a training step
    deployed_fn: WeightsFn  # that are evaluated, and packed
    # The state that has the scales of the deployed weights: these are what `cbp_jax.quantize` makes
    # of the latent weights and it.
    deployed_state_fn: StateFn = as_it_is


class Steps(NamedTuple):
    """State of `count_steps`."""

    count: jax.Array  # type: ignore[assignment]  # shape=(), dtype=int32


def make_method(
    config: ml_collections.FrozenConfigDict, steps_per_epoch: int, constrained: str
) -> Method:
    """Makes `config.method`.

    | method | forward weights | deployed weights |
    | --- | --- | --- |
    | "cbp", the paper's recipe | quantized | quantized |
    | "no_window", which constrains all weights from the start | quantized | quantized |
    | "closing", CBP by the number of steps | quantized | quantized |
    | "ste" | quantized | quantized |
    | "binary_relax" | mixed with quantized ones | quantized |
    | "parq" | PARQ's map | quantized |
    | "rounding" | latent | quantized, with scales measured on the weights of that moment |
    | "full_precision" | latent | latent |

    All but the first two use the same inner optimizer. Where forward weights depend on the scale,
    "sgd" keeps the latent ones within ±1, as the paper's recipe does.

    Args:
      config: of `settle`.
      steps_per_epoch: steps of an epoch of the schedule.
      constrained: pattern of the paths of the constrained parameters.
    """
    mask = cbp_jax.select(include=constrained)
    if config.method in ("cbp", "no_window"):
        optimizer = _multipliers(config, steps_per_epoch, mask)
        return Method(optimizer, cbp_jax.quantize, cbp_jax.quantize)
    clip, inner = optimizers.clip(config), optimizers.inner(config, steps_per_epoch)
    if config.method == "full_precision":
        return Method(_chain(clip=clip, inner=inner), latent, latent)
    box = optax.identity() if config.optimizer == "adamw" else _within_one(mask)
    scales = optimizers.scale_options(config)
    if config.method == "closing":
        closing = cbp_jax.closing(
            _chain(inner=inner, box=box),
            config.constraint,
            config.epochs * steps_per_epoch,
            closes_at=config.closes_at,
            strength=config.strength,
            mask=mask,
            **scales,
        )
        return Method(_chain(clip=clip, closing=closing), cbp_jax.quantize, cbp_jax.quantize)
    link = cbp_jax.ste(config.constraint, mask=mask, **scales)
    if config.method == "rounding":
        optimizer = _chain(constraint=link, clip=clip, inner=inner)
        refit = functools.partial(cbp_jax.refit_scales, scale_fn=scales["scale_fn"])
        return Method(optimizer, latent, _quantized_after(refit), refit)
    if config.method == "ste":
        optimizer = _chain(constraint=link, clip=clip, inner=inner, box=box)
        return Method(optimizer, cbp_jax.quantize, cbp_jax.quantize)
    optimizer = _chain(constraint=link, steps=count_steps(), clip=clip, inner=inner, box=box)
    weights_fn = functools.partial(_forward, _annealed(config, steps_per_epoch))
    return Method(optimizer, weights_fn, cbp_jax.quantize)


def count_steps() -> optax.GradientTransformation:
    """Returns a link that counts the steps taken, and changes nothing."""

    def init_fn(params: PyTree) -> Steps:
        del params
        return Steps(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: PyTree, state: Steps, params: PyTree | None = None
    ) -> tuple[PyTree, Steps]:
        del params
        return updates, Steps(optax.safe_increment(state.count))

    return optax.GradientTransformation(init_fn, update_fn)


def _chain(**links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Chains links whose states are found by their names."""
    return optax.with_extra_args_support(optax.named_chain(*links.items()))


def _within_one(mask: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    return cbp_jax.keep_params_in_box(-1.0, 1.0, mask)


def _multipliers(
    config: ml_collections.FrozenConfigDict,
    steps_per_epoch: int,
    mask: Callable[[PyTree], PyTree],
) -> optax.GradientTransformationExtraArgs:
    """The paper's recipe; under "adamw" its link before that optimizer."""
    no_window = config.method == "no_window"
    options = optimizers.multiplier_options(config) | {
        "steps_per_epoch": steps_per_epoch,
        "patience": config.patience,
        "window_growth": optimizers.window_growth(config.window_factor),
        "initial_window": float("inf") if no_window else 1.0,
        "mask": mask,
        **optimizers.scale_options(config),
    }
    if config.optimizer == "adamw":
        link = cbp_jax.cbp(config.constraint, **options)
        inner = optimizers.inner(config, steps_per_epoch)
        return _chain(clip=optimizers.clip(config), constraint=link, inner=inner)
    return cbp_jax.cbp_sgd(
        optimizers.learning_rate(config, steps_per_epoch),
        config.constraint,
        weight_decay=config.weight_decay,
        lr_decay=1.0 if no_window else config.lr_decay,
        lr_decay_window=config.lr_decay_window,
        **options,
    )


def _annealed(config: ml_collections.FrozenConfigDict, steps_per_epoch: int) -> _LeafFn:
    """The map of a leaf under "parq" or "binary_relax"; before its start, the latent weights."""
    total = config.epochs * steps_per_epoch
    start = round(config.anneal_start * total)
    end = max(round(config.anneal_end * total), start + 1)

    def parq(
        w: jax.Array, constraint: cbp_jax.Constraint, scale: jax.Array, step: jax.Array
    ) -> jax.Array:
        inverse_slope = proximal.mirrored_sigmoid(step, start, end, config.anneal_steepness)
        return jnp.where(step < start, w, proximal.parq(w, constraint, scale, inverse_slope))

    def binary_relax(
        w: jax.Array, constraint: cbp_jax.Constraint, scale: jax.Array, step: jax.Array
    ) -> jax.Array:
        return proximal.binary_relax(w, constraint, scale, proximal.rise(step, start, end))

    return {"parq": parq, "binary_relax": binary_relax}[config.method]


def _forward(leaf_fn: _LeafFn, params: PyTree, opt_state: optax.OptState) -> PyTree:
    """Maps constrained leaves; others are as they are."""
    link, step = opt_state["constraint"], opt_state["steps"].count

    def leaf(w: jax.Array, constraint: Any, scale: Any) -> jax.Array:
        constrained = isinstance(constraint, cbp_jax.Constraint)
        return leaf_fn(w, constraint, scale, step) if constrained else w

    return jax.tree.map(leaf, params, link.constraints, link.weight_scale)


def _quantized_after(state_fn: StateFn) -> WeightsFn:
    return lambda params, opt_state: cbp_jax.quantize(params, state_fn(params, opt_state))
