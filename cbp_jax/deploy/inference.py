"""Running a network from packed weights, in two ways: expanded when they are loaded, or kept packed in memory."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.tree_util import Partial
from jax.typing import DTypeLike

from cbp_jax.deploy.packing import Packed, is_array_like, unpack
from cbp_jax.masking import PyTree


def make_predict(
    model_fn: Callable[..., Any],
    packed: Packed,
    template: PyTree = None,
    *,
    weights: Literal["expand", "packed"] = "expand",
    dtype: DTypeLike | None = None,
) -> Partial:
    """A jitted `predict(*inputs)` from packed weights.

    The two ways differ in what stays in memory, not in what comes out:

    - "expand": the weights are unpacked now. Speed and memory of an ordinary network.
    - "packed": codes and scales stay, and weights are unpacked inside the jitted function, where
      they are used, at every call. Slower, as no backend of JAX multiplies by codes. It saves
      memory where the compiler does not unpack all layers at once. XLA's CPU backend does unless
      its scheduler minds memory, so here it is told to; `XLA_FLAGS` with
      `--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED` does it for a whole program,
      such as one that calls an exported function. A `jax.lax.scan` over stacked layers unpacks one
      at a time everywhere.

    Args:
      model_fn: `model_fn(params, *inputs)`, with params like the template.
      packed: of `pack` or `load_packed`.
      template: as `unpack` takes it.
      weights: "expand" or "packed".
      dtype: of the constrained weights in the computation; None for the one they had.

    Returns:
      A `jax.tree_util.Partial`: a function of the inputs, whose `args[0]` are the weights on the
      device, which `func`, the jitted function, takes as its first argument. So
      `predict.func.lower(*predict.args, x).compile().memory_analysis()` says what memory it needs,
      and `jax.export.export(predict.func)(*predict.args, x)` exports it without weights, to be
      called with a `Packed` and `x`.

    Raises:
      PackedError: as `unpack` does.
      ValueError: if `weights` is neither "expand" nor "packed".

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.5, 0.5], [0.5, 0.5]])}
      >>> packed = cbp_jax.pack(params, cbp_jax.cbp(constraint="binary").init(params))
      >>> predict = cbp_jax.make_predict(lambda params, x: x @ params["kernel"], packed, weights="packed")
      >>> print(predict(jnp.ones((1, 2))))
      [[0. 1.]]
    """
    if weights == "expand":
        arrays, rest = _partition(unpack(packed, template, dtype=dtype))

        def predict_from_arrays(arrays: PyTree, *inputs: Any) -> Any:
            return model_fn(_combine(arrays, rest), *inputs)

        return Partial(jax.jit(predict_from_arrays), arrays)
    if weights != "packed":
        raise ValueError(f"weights={weights!r} is neither 'expand' nor 'packed'")
    jax.eval_shape(
        lambda packed: _partition(unpack(packed, template, dtype=dtype))[0], packed
    )  # fail early on a mismatch
    options = (
        {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        if jax.default_backend() == "cpu"
        else None
    )

    def predict(packed: Packed, *inputs: Any) -> Any:
        return model_fn(unpack(packed, template, dtype=dtype), *inputs)

    return Partial(jax.jit(predict, compiler_options=options), jax.device_put(packed))


def _partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The arrays of a tree, and its other leaves, which no jitted function takes; None stands where the other part has a leaf."""
    arrays = jax.tree.map(lambda leaf: leaf if is_array_like(leaf) else None, tree)
    return arrays, jax.tree.map(lambda leaf: None if is_array_like(leaf) else leaf, tree)


def _combine(arrays: PyTree, rest: PyTree) -> PyTree:
    return jax.tree.map(
        lambda own, array: array if own is None else own,
        rest,
        arrays,
        is_leaf=lambda node: node is None,
    )
