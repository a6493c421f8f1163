"""How far the weights are from their levels: failure score, layer report, relative weights."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cbp_jax.constraints import Constraint
from cbp_jax.masking import PyTree, path_string
from cbp_jax.state import ConstrainedLeaf, constrained_leaves, find_states, float_dtype

# A weight counts as on its level when it is within this share of the scale.
ON_LEVEL = 0.01


def constraint_failure_score(
    params: PyTree, opt_state: optax.OptState, relative: bool = False
) -> jax.Array:
    """The paper's CFS: the mean violation over all constrained weights, whatever the window.

    With `Y(w) = 2 |w - q(w)|` and `n` constrained weights, `CFS = sum Y(w) / n`; if relative,
    `CFS = sum (Y(w) / scale) / n`.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more links' states in it.
      relative: whether to measure in units of the scale, which makes layers and networks
        comparable; weights of scale 0 count as satisfied.

    Returns:
      Array of shape (), float; 0 when every weight is on a level.

    Raises:
      ValueError: as `cbp_jax.quantize` does.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25]])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> print(cbp_jax.constraint_failure_score(params, state))
      0.5
      >>> print(cbp_jax.constraint_failure_score(params, state, relative=True))
      1.0

    Reference: Kim and Jeong (2021), section 4.
    """
    leaves = constrained_leaves(params, opt_state)
    total = sum(
        (jnp.sum(_violation(leaf, relative), dtype=float_dtype()) for leaf in leaves),
        jnp.zeros((), float_dtype()),
    )
    size = sum(leaf.weight.size for leaf in leaves)
    return total / float(max(size, 1))  # a float, since int32 may be too small


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Statistics of one constrained leaf; the arrays have shape () and are float."""

    layer: str = dataclasses.field(metadata={"static": True})
    constraint: str = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})  # per weight
    weights: int = dataclasses.field(metadata={"static": True})
    scales: int = dataclasses.field(metadata={"static": True})  # 1, or the number of channels
    scale: jax.Array  # the mean over channels
    bad_scales: jax.Array  # scales that are 0 or not finite, whose weights are not constrained
    violation: jax.Array  # mean violation in units of the scale, whatever the window
    on_level: jax.Array  # share of weights within 1% of the scale of a level, as `pack` requires
    multiplier_mean: jax.Array | None  # None under `ste`
    multiplier_max: jax.Array | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """One `LayerReport` per constrained leaf, and the state of the schedule; prints as a table.

    The arrays have shape (). With several links, each figure is that of the link furthest behind;
    if all are `ste`, there are none.
    """

    layers: tuple[LayerReport, ...]
    window: jax.Array | None  # float: the smallest
    multiplier_updates: jax.Array | None  # int32: the fewest
    steps: jax.Array | None  # int32
    skipped_values: jax.Array | None  # int32: steps without a finite value

    def __str__(self) -> str:
        header = (
            "layer",
            "constraint",
            "weights",
            "scale",
            "violation",
            f"on level (±{ON_LEVEL:.0%})",
            "multiplier mean",
            "max",
        )
        lines = aligned([header, *map(_table_row, self.layers)])
        if self.window is not None and self.steps is not None:
            lines += self._schedule(float(self.window), int(self.steps))
        flagged = [layer.layer for layer in self.layers if layer.bad_scales > 0]
        if flagged:
            lines.append(f"scale 0 or not finite, so not constrained: {', '.join(flagged)}")
        return "\n".join(lines)

    def _schedule(self, window: float, steps: int) -> list[str]:
        if self.multiplier_updates is None or self.skipped_values is None:
            return [f"window {window:.4g} after {steps:,} steps"]
        updates, skipped = int(self.multiplier_updates), int(self.skipped_values)
        plural = "" if updates == 1 else "s"
        lines = [f"window {window:.4g}, {updates:,} multiplier update{plural} in {steps:,} steps"]
        if steps and updates <= 1:
            lines.append(
                "only the first update so far: "
                "steps_per_epoch * patience should be a small part of your run"
            )
        if skipped:
            lines.append(
                f"{skipped:,} of {steps:,} steps had no finite value: "
                "call optimizer.update(grads, state, params, value=loss)"
            )
        return lines


def layer_report(params: PyTree, opt_state: optax.OptState) -> Report:
    """Reports how well each constrained leaf meets its constraint.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more links' states in it.

    Returns:
      A `Report`, a pytree that jitted functions may return; `print` shows it as a table. Violations
      are means of `2 |w - q(w)|` in units of the scale.

    Raises:
      ValueError: as `cbp_jax.quantize` does.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25, 0.5]])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> print(cbp_jax.layer_report(params, state))
      layer   constraint  weights  scale  violation  on level (±1%)  multiplier mean  max
      ------  ----------  -------  -----  ---------  --------------  ---------------  ---
      kernel  binary            3    0.5     0.6667          33.33%                0    0
      window 1, 0 multiplier updates in 0 steps
    """
    states = find_states(opt_state)

    def furthest_behind(name: str, pick: Callable[..., jax.Array]) -> jax.Array | None:
        found = [getattr(state, name) for state in states if name in state._fields]
        return pick(jnp.stack(found)) if found else None

    return Report(
        tuple(map(_report_leaf, constrained_leaves(params, opt_state))),
        window=furthest_behind("window", jnp.min),
        multiplier_updates=furthest_behind("multiplier_updates", jnp.min),
        steps=furthest_behind("count", jnp.max),
        skipped_values=furthest_behind("skipped_values", jnp.max),
    )


def _report_leaf(leaf: ConstrainedLeaf) -> LayerReport:
    size, scale, multiplier = leaf.weight.size, leaf.scale, leaf.multiplier
    violation = _violation(leaf, relative=True)

    def mean(values: jax.Array) -> jax.Array:
        return jnp.sum(values, dtype=float_dtype()) / float(max(size, 1))

    return LayerReport(
        layer=path_string(leaf.path),
        constraint=leaf.constraint.name,
        bits=leaf.constraint.bits,
        weights=size,
        scales=scale.size,
        scale=jnp.mean(scale) if scale.size else jnp.zeros((), scale.dtype),
        bad_scales=jnp.sum(~((scale > 0) & jnp.isfinite(scale))) * bool(size),
        violation=mean(violation),
        on_level=mean(violation <= 2 * ON_LEVEL),
        multiplier_mean=None if multiplier is None else mean(multiplier),
        multiplier_max=None
        if multiplier is None
        else jnp.max(multiplier, initial=-jnp.inf if size else 0).astype(float_dtype()),
    )


def level_histogram(params: PyTree, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Counts the weights nearest to each level.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more links' states in it.

    Returns:
      For the path of each constrained leaf an int32 array with one count per level of its
      constraint, lowest first. Weights that are NaN are not counted.

    Raises:
      ValueError: as `cbp_jax.quantize` does.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25, 0.5]])}
      >>> state = cbp_jax.cbp(constraint="ternary").init(params)
      >>> print(cbp_jax.level_histogram(params, state)["kernel"])
      [1 0 2]
    """
    return {
        path_string(leaf.path): _count_levels(leaf.constraint, leaf.weight, leaf.scale)
        for leaf in constrained_leaves(params, opt_state)
    }


@functools.partial(jax.jit, static_argnums=0)  # so that calls outside of jit compile once
def _count_levels(constraint: Constraint, w: jax.Array, scale: jax.Array) -> jax.Array:
    nearest = jnp.where(jnp.isnan(w), -1, constraint.level_index(w, scale))
    # One reduction per level is sharded like the weights; a scatter (jnp.bincount) is not.
    return jax.lax.map(
        lambda level: jnp.sum(nearest == level, dtype=jnp.int32), jnp.arange(len(constraint.levels))
    )


def relative_weights(params: PyTree, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """Returns the latent weights of each constrained leaf in units of its scale: `w / scale`.

    In these units the levels are those of the constraint, whatever the layer.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more links' states in it.

    Returns:
      For the path of each constrained leaf an array of its shape, of dtype
      `promote_types(w.dtype, float32)`. Where the scale is 0, weights are not divided.

    Raises:
      ValueError: as `cbp_jax.quantize` does.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25]])}
      >>> state = cbp_jax.cbp(constraint="binary").init(params)
      >>> print(cbp_jax.relative_weights(params, state)["kernel"])
      [[-1.5  0.5]]
    """
    return {
        path_string(leaf.path): _per_scale(leaf.weight, leaf)
        for leaf in constrained_leaves(params, opt_state)
    }


def _violation(leaf: ConstrainedLeaf, relative: bool) -> jax.Array:
    violation = leaf.constraint.violation(leaf.weight, leaf.scale)
    return _per_scale(violation, leaf) if relative else violation


def _per_scale(values: jax.Array, leaf: ConstrainedLeaf) -> jax.Array:
    return values / jnp.where(leaf.scale > 0, leaf.scale, 1)


def _table_row(layer: LayerReport) -> tuple[str, ...]:
    return (
        layer.layer,
        layer.constraint,
        f"{layer.weights:,}",
        f"{float(layer.scale):.4g}",
        f"{float(layer.violation):.4g}",
        f"{float(layer.on_level):.2%}",
        "" if layer.multiplier_mean is None else f"{float(layer.multiplier_mean):.3g}",
        "" if layer.multiplier_max is None else f"{float(layer.multiplier_max):.3g}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table: the first row is its header, and all but two columns are right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justify = (str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2))
    lines = [
        "  ".join(how(cell, width) for how, cell, width in zip(justify, row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]
