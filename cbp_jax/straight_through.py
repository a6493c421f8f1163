"""The straight-through estimator alone: a link that measures scales and nothing else."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from cbp_jax.arguments import check_function
from cbp_jax.masking import Path, PyTree, as_path, flatten_with_paths, is_variable
from cbp_jax.rules import ConstraintSpec, MaskSpec, Rules, assign_constraints, compile_rules
from cbp_jax.scales import SCALE_FORM, ScaleFn, measure_scale, warn_if_quantized
from cbp_jax.state import STEState, check_state


def ste(
    constraint: ConstraintSpec,
    *,
    mask: MaskSpec = None,
    scale_axis: int | tuple[int, ...] | None = None,
    scale_fn: ScaleFn | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The straight-through estimator: a link that measures scales, and passes gradients through.

    There are no multipliers, and latent weights stay off their levels; the forward weights of
    `cbp_jax.quantize` are on them:

        forward = q(w),    updates = gradient of the loss at q(w)

    Metrics, `pack(..., round=True)`, `export_onnx` and `export_gguf` take its state as they take
    that of `cbp`, so that networks trained in this way (BinaryConnect, BitNet) are measured and
    deployed alike.

    Args:
      constraint: as in `cbp_jax.cbp`.
      mask: as in `cbp_jax.cbp`.
      scale_axis: as in `cbp_jax.cbp`.
      scale_fn: as in `cbp_jax.cbp`. To measure the scales anew during training, as BitNet does in
        every step, call `cbp_jax.refit_scales`.

    Returns:
      A link whose `init(params)` measures the scales; its `update` changes nothing.

    Raises:
      ValueError: as `cbp_jax.cbp` does.
      TypeError: likewise.

    Example:
      >>> import cbp_jax, jax, jax.numpy as jnp, optax
      >>> optimizer = optax.chain(cbp_jax.ste("binary"), optax.sgd(0.5))
      >>> params = {"kernel": jnp.array([[0.5, -0.1]])}
      >>> state = optimizer.init(params)
      >>> grads = jax.grad(lambda p: jnp.sum(p["kernel"]))(cbp_jax.quantize(params, state))
      >>> updates, state = optimizer.update(grads, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(cbp_jax.quantize(params, state)["kernel"])
      [[ 0.3 -0.3]]

    Reference: Courbariaux, Bengio and David, "BinaryConnect", NeurIPS 2015; Kim and Jeong (2021),
      table 4, compare with it.
    """
    rules, kept_axes = compile_rules(constraint), check_axes(scale_axis)
    check_function("scale_fn", scale_fn, SCALE_FORM)

    def init_fn(params: PyTree) -> STEState:
        return STEState(*measure(rules, mask, params, kept_axes, scale_fn))

    def update_fn(
        updates: PyTree, state: STEState, params: PyTree | None = None
    ) -> tuple[PyTree, STEState]:
        del params
        check_state("ste", state, STEState)
        return updates, state

    return optax.with_extra_args_support(optax.GradientTransformation(init_fn, update_fn))


def measure(
    rules: Rules,
    mask: MaskSpec,
    params: PyTree,
    kept_axes: Sequence[int],
    scale_fn: ScaleFn | None,
) -> tuple[PyTree, PyTree]:
    """Returns the trees of constraints and of scales, with `MaskedNode` for unconstrained leaves.

    Raises:
      ValueError: as `cbp_jax.cbp(...).init` does.
      TypeError: likewise.
    """
    if is_placeholder(params):
        return 0, 0
    chosen = assign_constraints(rules, mask, params)

    def build(leaf_fn: Callable[[Path, PyTree], Any]) -> PyTree:
        def build_leaf(keys: Any, node: PyTree) -> Any:
            path = as_path(keys)
            return leaf_fn(path, node) if path in chosen else optax.MaskedNode()

        return jax.tree_util.tree_map_with_path(build_leaf, params, is_leaf=is_variable)

    constraints = build(lambda path, node: chosen[path])
    scales = build(
        lambda path, node: measure_scale(
            path, jax.tree.leaves(node)[0], chosen[path], kept_axes, scale_fn
        )
    )
    for path, leaf in flatten_with_paths(params):
        if path in chosen:
            warn_if_quantized(path, leaf, chosen[path], kept_axes)
    return constraints, scales


def is_placeholder(params: PyTree) -> bool:
    """Whether optax's `tree_map_params` asks where the copies of the parameters are."""
    return type(params).__name__ == "_ParamsPlaceholder"


def check_axes(scale_axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Returns the kept axes; raises ValueError if they are no integers."""
    if scale_axis is None:
        return ()
    axes = scale_axis if isinstance(scale_axis, tuple) else (scale_axis,)
    if not all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes):
        raise ValueError(
            f"scale_axis must be an integer, a tuple of them or None, got {scale_axis!r}"
        )
    return axes
