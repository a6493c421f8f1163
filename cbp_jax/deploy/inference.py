"""Runs a network from packed weights, expanded when they are loaded or kept packed in memory."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.tree_util import Partial
from jax.typing import DTypeLike

from cbp_jax.arguments import shown
from cbp_jax.deploy.packed import Packed, check_packed
from cbp_jax.deploy.packing import is_array_like, unpack
from cbp_jax.masking import PyTree


def make_predict(
    model_fn: Callable[..., Any],
    packed: Packed,
    template: PyTree = None,
    *,
    weights: Literal["expand", "packed"] = "expand",
    dtype: DTypeLike | None = None,
) -> Partial:
    """Returns a jitted `predict(*inputs)` that uses packed weights.

    The two ways differ in what stays in memory, not in the outputs:

    - "expand": the weights are unpacked now. Speed and memory are those of an ordinary network.
    - "packed": codes and scales stay in memory, and the jitted function unpacks weights where they
      are used, at every call. It is slower, since no backend of JAX multiplies by codes, and saves
      memory only if the compiler does not unpack all layers at once. XLA's CPU backend does so
      unless the memory-optimized scheduler is set, as here; for a whole program, such as one that
      calls an exported function, set `XLA_FLAGS` to
      `--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED`. A `jax.lax.scan` over stacked
      layers unpacks one layer at a time on every backend.

    Args:
      model_fn: `model_fn(params, *inputs)`, with params like the template.
      packed: the result of `pack` or `load_packed`.
      template: as in `unpack`.
      weights: "expand" or "packed".
      dtype: dtype of the constrained weights in the computation; None keeps their own.

    Returns:
      A `jax.tree_util.Partial`: a function of the inputs. Its `func` is the jitted function, whose
      first argument is `args[0]`, the weights on the device. So
      `predict.func.lower(*predict.args, x).compile().memory_analysis()` gives the memory it needs,
      and `jax.export.export(predict.func)(*predict.args, x)` exports it without weights, to be
      called with a `Packed` and `x`.

    Raises:
      PackedError: as `unpack` does.
      ValueError: if `weights` is neither "expand" nor "packed".
      TypeError: as `unpack` does; or if `model_fn` is no function.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"kernel": jnp.array([[-0.5, 0.5], [0.5, 0.5]])}
      >>> packed = cbp_jax.pack(params, cbp_jax.cbp(constraint="binary").init(params))
      >>> model_fn = lambda params, x: x @ params["kernel"]
      >>> predict = cbp_jax.make_predict(model_fn, packed, weights="packed")
      >>> print(predict(jnp.ones((1, 2))))
      [[0. 1.]]
    """
    if not callable(model_fn):
        raise TypeError(f"model_fn must be a function (params, *inputs), got {shown(model_fn)}")
    check_packed(packed, "make_predict")
    if isinstance(weights, str) and weights == "expand":
        arrays, rest = _partition(unpack(packed, template, dtype=dtype))

        def predict_from_arrays(arrays: PyTree, *inputs: Any) -> Any:
            return model_fn(_combine(arrays, rest), *inputs)

        return Partial(jax.jit(predict_from_arrays), arrays)
    if not isinstance(weights, str) or weights != "packed":
        raise ValueError(f"weights={shown(weights)} is neither 'expand' nor 'packed'")
    # Fail early on a mismatch.
    jax.eval_shape(lambda packed: _partition(unpack(packed, template, dtype=dtype))[0], packed)
    options = (
        {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
        if jax.default_backend() == "cpu"
        else None
    )

    def predict(packed: Packed, *inputs: Any) -> Any:
        return model_fn(unpack(packed, template, dtype=dtype), *inputs)

    return Partial(jax.jit(predict, compiler_options=options), jax.device_put(packed))


def _partition(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into its arrays, which jit accepts, and its other leaves; gaps are None."""
    arrays = jax.tree.map(lambda leaf: leaf if is_array_like(leaf) else None, tree)
    return arrays, jax.tree.map(lambda leaf: None if is_array_like(leaf) else leaf, tree)


def _combine(arrays: PyTree, rest: PyTree) -> PyTree:
    return jax.tree.map(
        lambda own, array: array if own is None else own,
        rest,
        arrays,
        is_leaf=lambda node: node is None,
    )
