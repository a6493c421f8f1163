"""How far the weights are from their levels: the failure score, a report per layer, a histogram of levels."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from cbp_jax.masking import PyTree, path_string
from cbp_jax.state import (
    ConstrainedLeaf,
    constrained_leaves,
    find_states,
    float_dtype,
    window,
)

# A weight counts as on its level when it is within this share of the scale.
ON_LEVEL = 0.01


def constraint_failure_score(
    params: PyTree, opt_state: optax.OptState, relative: bool = False
) -> jax.Array:
    """The paper's CFS: the mean violation over all constrained weights, whatever the window.

    With `Y(w) = 2 |w - q(w)|` and `n` constrained weights: `CFS = sum Y(w) / n`, or `sum (Y(w) /
    scale) / n`.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more `CBPState`s in it.
      relative: in units of the scale, which makes layers and networks comparable; weights of scale
        0 count as met.

    Returns:
      Array of shape (), float. 0 when every weight is on a level.

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
    return total / float(
        max(sum(leaf.weight.size for leaf in leaves), 1)
    )  # float: there may be more than int32 holds


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Statistics of one constrained leaf; the arrays have shape () and are float."""

    layer: str = dataclasses.field(metadata={"static": True})
    constraint: str = dataclasses.field(metadata={"static": True})
    bits: int = dataclasses.field(metadata={"static": True})  # a weight
    weights: int = dataclasses.field(metadata={"static": True})
    scales: int = dataclasses.field(metadata={"static": True})  # 1, or one a channel
    scale: jax.Array  # the mean, if there is one a channel
    bad_scales: jax.Array  # how many scales are 0 or not finite: their weights are not constrained
    violation: jax.Array  # mean violation in units of the scale, whatever the window
    on_level: (
        jax.Array
    )  # share of the weights within 1% of the scale of a level, the tolerance of `pack`
    multiplier_mean: jax.Array
    multiplier_max: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Report:
    """One `LayerReport` per constrained leaf, and where the schedule stands; printed, an aligned
    table with a footer.

    The arrays have shape (). Of several links, each figure is that of the one furthest behind.
    """

    layers: tuple[LayerReport, ...]
    window: jax.Array  # float: the smallest
    multiplier_updates: jax.Array  # int32: the fewest
    steps: jax.Array  # int32
    skipped_values: jax.Array  # int32: steps without a finite value

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
        steps, updates, skipped = (
            int(self.steps),
            int(self.multiplier_updates),
            int(self.skipped_values),
        )
        plural = "" if updates == 1 else "s"
        lines.append(
            f"window {float(self.window):.4g}, {updates:,} multiplier update{plural} in {steps:,} steps"
        )
        if steps and updates <= 1:
            lines.append(
                "only the first update so far: steps_per_epoch * patience should be a small part of your run"
            )
        if skipped:
            lines.append(
                f"{skipped:,} of {steps:,} steps had no finite value: call optimizer.update(grads, state, params, value=loss)"
            )
        flagged = [layer.layer for layer in self.layers if layer.bad_scales > 0]
        if flagged:
            lines.append(f"scale 0 or not finite, so not constrained: {', '.join(flagged)}")
        return "\n".join(lines)


def layer_report(params: PyTree, opt_state: optax.OptState) -> Report:
    """How well each constrained leaf meets its constraint.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more `CBPState`s in it.

    Returns:
      A `Report`, a pytree that may leave a jitted function; `print` shows it as a table. Violations
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
    layers = []
    for leaf in constrained_leaves(params, opt_state):
        violation, n = _violation(leaf, relative=True), float(max(leaf.weight.size, 1))
        layers.append(
            LayerReport(
                layer=path_string(leaf.path),
                constraint=leaf.constraint.name,
                bits=leaf.constraint.bits,
                weights=leaf.weight.size,
                scales=leaf.scale.size,
                scale=jnp.mean(leaf.scale) if leaf.scale.size else jnp.zeros((), leaf.scale.dtype),
                bad_scales=jnp.sum(~((leaf.scale > 0) & jnp.isfinite(leaf.scale)))
                * bool(leaf.weight.size),
                violation=jnp.sum(violation, dtype=float_dtype()) / n,
                on_level=jnp.sum(violation <= 2 * ON_LEVEL, dtype=float_dtype()) / n,
                multiplier_mean=jnp.sum(leaf.multiplier, dtype=float_dtype()) / n,
                multiplier_max=jnp.max(
                    leaf.multiplier, initial=-jnp.inf if leaf.multiplier.size else 0
                ).astype(float_dtype()),
            )
        )
    states = find_states(opt_state)

    def furthest(name: str, pick: Callable[..., jax.Array]) -> jax.Array:
        return pick(jnp.stack([getattr(state, name) for state in states]))

    return Report(
        tuple(layers),
        window=window(opt_state),
        multiplier_updates=furthest("multiplier_updates", jnp.min),
        steps=furthest("count", jnp.max),
        skipped_values=furthest("skipped_values", jnp.max),
    )


def level_histogram(params: PyTree, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """How many weights are nearest to each level.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more `CBPState`s in it.

    Returns:
      For the path of each constrained leaf an int32 array with a count for each of its constraint's
      levels, lowest first.

    Raises:
      ValueError: as `cbp_jax.quantize` does.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.75, 0.25, 0.5]])}
      >>> state = cbp_jax.cbp(constraint="ternary").init(params)
      >>> print(cbp_jax.level_histogram(params, state)["kernel"])
      [1 0 2]
    """
    histogram = {}
    for leaf in constrained_leaves(params, opt_state):
        nearest = leaf.constraint.level_index(leaf.weight, leaf.scale)
        levels = jnp.arange(len(leaf.constraint.levels))
        # A reduction a level, which shards as the weights do; a scatter (jnp.bincount) does not.
        histogram[path_string(leaf.path)] = jax.lax.map(
            lambda level, nearest=nearest: jnp.sum(nearest == level, dtype=jnp.int32), levels
        )
    return histogram


def relative_weights(params: PyTree, opt_state: optax.OptState) -> dict[str, jax.Array]:
    """The latent weights of each constrained leaf in units of its scale: `w / scale`.

    The levels are then those of the constraint, so that the weights of all layers fit one
    histogram.

    Args:
      params: the latent weights.
      opt_state: any optimizer state with one or more `CBPState`s in it.

    Returns:
      For the path of each constrained leaf an array of its shape, of dtype
      `promote_types(w.dtype, float32)`. Where the scale is 0 the weights are not divided.

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
        f"{float(layer.multiplier_mean):.3g}",
        f"{float(layer.multiplier_max):.3g}",
    )


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, the first row its header: the first two columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justify = (str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2))
    lines = [
        "  ".join(how(cell, width) for how, cell, width in zip(justify, row, widths, strict=True))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return [line.rstrip() for line in lines]
