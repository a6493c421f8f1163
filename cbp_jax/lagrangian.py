"""The constraint's part of the Lagrangian, `sum(multiplier * violation)`, in the form each compiler
makes the least work of.

It is a sum of an elementwise expression over every constrained weight, so it should cost one
reading of the weights and the multipliers at most, and nothing where it fits into the pass that
adds the constraint's gradient. Left to itself, XLA does so on a TPU only:

- On a CPU it does not vectorise such a sum: it writes all products to memory first, and keeps a
  copy of the weights, which a donated step overwrites. Here blocks of products are added to one
  block of sums, which stays in the cache, tensor after tensor.
- On a GPU it starts two or three kernels a tensor, and writes the products of some. Here each
  tensor is summed in short rows, which XLA fuses with the gradient and the optimizer into one
  kernel a tensor, and the rows of all tensors are added up at the end.

`experiments/benchmarks` has what this was measured with.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from cbp_jax.constraints import Constraint
from cbp_jax.state import ConstrainedLeaf, float_dtype

# A function of weights, scale, multipliers and window: the products, in the dtype of the sum.
Products = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
Arrays = tuple[jax.Array, ...]
Form = Callable[[Arrays, Arrays, Arrays, jax.Array], tuple[jax.Array, jax.Array]]

_BLOCK = (
    2**18
)  # numbers at least, on a CPU: enough to share out among its cores, few enough that their sums stay in a cache
_GROUPS = 64  # on a CPU: devices at most that may share a matrix's rows without sending any
_ROW = 64  # numbers in a row on a GPU: at this length XLA fuses every tensor of a ResNet-50, at 128 not


def constraint_sum(
    leaves: Sequence[ConstrainedLeaf], window: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`sum(multiplier * violation(w, window))` over all constrained weights, and the window to
    compute the gradients with.

    The second is the window given, but on a CPU it depends on the sum, which therefore is done with
    the weights before a donated step overwrites them; else XLA copies them first.

    Args:
      leaves: the constrained leaves, with the multipliers in force.
      window: shape (), float.

    Returns:
      The sum, shape (), float32, or float64 under x64; and the window.
    """
    if not leaves:
        return jnp.zeros((), float_dtype()), window
    constraints = tuple(leaf.constraint for leaf in leaves)
    weights, scales, multipliers = zip(
        *((leaf.weight, leaf.scale, leaf.multiplier) for leaf in leaves), strict=True
    )
    return _constraint_sum(constraints, weights, scales, multipliers, window)


@functools.partial(jax.jit, static_argnums=0)  # so that calls outside of jit compile once
def _constraint_sum(
    constraints: tuple[Constraint, ...],
    weights: Arrays,
    scales: Arrays,
    multipliers: Arrays,
    window: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    products = [_weighted_violation(constraint) for constraint in constraints]
    plain = functools.partial(_sum_directly, products)
    if any(AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types for w in weights):
        return plain(
            weights, scales, multipliers, window
        )  # the others reshape, which explicit shardings need not allow
    in_rows = functools.partial(_sum_in_rows, products)
    by_platform: dict[str, Form] = {
        "cpu": functools.partial(_sum_in_blocks, products),
        "cuda": in_rows,
        "rocm": in_rows,
    }
    return lax.platform_dependent(
        weights, scales, multipliers, window, default=plain, **by_platform
    )


def _weighted_violation(constraint: Constraint) -> Products:
    def products(
        w: jax.Array, scale: jax.Array, multiplier: jax.Array, window: jax.Array
    ) -> jax.Array:
        return (multiplier * constraint.violation(w, scale, window)).astype(float_dtype())

    return products


def _sum_directly(
    products: Sequence[Products],
    weights: Arrays,
    scales: Arrays,
    multipliers: Arrays,
    window: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    tensors = zip(products, weights, scales, multipliers, strict=True)
    return sum(
        (jnp.sum(product(w, a, m, window)) for product, w, a, m in tensors),
        jnp.zeros((), float_dtype()),
    ), window


def _sum_in_rows(
    products: Sequence[Products],
    weights: Arrays,
    scales: Arrays,
    multipliers: Arrays,
    window: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    sums = []
    for product, w, scale, multiplier in zip(products, weights, scales, multipliers, strict=True):
        values = jnp.atleast_1d(product(w, scale, multiplier, window))
        last = values.shape[-1]
        row = max(n for n in range(1, _ROW + 1) if last % n == 0)
        rows = (
            (*values.shape[:-1], last // row, row) if row >= 8 else (1, values.size)
        )  # or none worth a kernel of its own
        values = jnp.sum(values.reshape(rows), axis=-1).reshape(-1)
        # Through a gather, which keeps the sharding of one tensor from spreading to the others, and
        # is fused.
        sums.append(values.at[jnp.arange(values.size)].get(mode="promise_in_bounds"))
    # Without the barrier XLA sums before it concatenates, with a kernel or two for each tensor.
    return jnp.sum(lax.optimization_barrier(jnp.concatenate(sums))), window


def _sum_in_blocks(
    products: Sequence[Products],
    weights: Arrays,
    scales: Arrays,
    multipliers: Arrays,
    window: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    total = jnp.zeros((), float_dtype())
    for product, w, scale, multiplier in zip(products, weights, scales, multipliers, strict=True):
        total += _sum_tensor_in_blocks(product, w, scale, multiplier, window)
        # So the tensors come one after another, and use the same memory: XLA does not know that no
        # sum is below minus infinity.
        window = jnp.where(total < -jnp.inf, jnp.nan, window)
    return total, window


def _sum_tensor_in_blocks(
    product: Products, w: jax.Array, scale: jax.Array, multiplier: jax.Array, window: jax.Array
) -> jax.Array:
    layout = (
        _block_layout(w.shape) if w.ndim > 1 and (scale.ndim == 0 or scale.shape[-2] == 1) else None
    )
    if layout is None:
        return jnp.sum(product(w, scale, multiplier, window))
    outer, blocks = layout[0], layout[3]
    axes = [
        axis for axis, n in enumerate(layout) if n > 1
    ]  # of axes of one XLA would make another layout, in a copy
    tensors = [array.reshape([layout[axis] for axis in axes]) for array in (w, multiplier)]
    if scale.ndim:
        scale = jnp.broadcast_to(scale, (*w.shape[:-2], 1, scale.shape[-1])).reshape(
            outer, -1, 1, 1, scale.shape[-1]
        )
    block_shape = [n for axis, n in enumerate(layout) if axis not in (0, 3)]

    def add_block(i: jax.Array, sums: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(i)
        start = [(i // blocks, zero, zero, i % blocks, zero, zero)[axis] for axis in axes]
        size = [1 if axis in (0, 3) else layout[axis] for axis in axes]
        block, its = (
            lax.dynamic_slice(tensor, start, size).reshape(block_shape) for tensor in tensors
        )
        return sums + product(block, scale[i // blocks] if scale.ndim else scale, its, window)

    zero = jnp.where(
        window < -jnp.inf, jnp.nan, jnp.zeros((), float_dtype())
    )  # not to be had before the window is
    return jnp.sum(lax.fori_loop(0, outer * blocks, add_block, jnp.broadcast_to(zero, block_shape)))


def _block_layout(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes (outer, matrices, groups, blocks, rows, columns) to see a tensor in: all but outer
    and blocks make a block.

    A block has several matrices, or a part of one: rows from all over it, so that of rows shared
    out among devices each has its part of every block; those of a group are neighbours, because
    memory is read a page at a time. None if it were the only block.
    """
    *leading, rows, columns = shape
    count = math.prod(leading)
    if math.prod(shape) < 2 * _BLOCK:
        return None
    matrices = _smallest_divisor(count, _BLOCK / (rows * columns))
    groups = math.gcd(rows, _GROUPS) if matrices == 1 else 1
    height = (
        _smallest_divisor(rows // groups, _BLOCK / (groups * columns)) if matrices == 1 else rows
    )
    blocks = rows // groups // height
    return (
        (count // matrices, matrices, groups, blocks, height, columns)
        if count // matrices * blocks > 1
        else None
    )


def _smallest_divisor(number: int, least: float) -> int:
    """The smallest divisor that is not less, or the number itself."""
    return min((n for n in range(1, number + 1) if number % n == 0 and n >= least), default=number)
