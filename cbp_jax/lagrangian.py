"""The constraint's part of the Lagrangian, in the form each backend compiles best.

`sum(multiplier * violation)` should cost at most one reading of the weights and multipliers, and
nothing where it fuses with the pass that adds the constraint's gradient. XLA achieves that unaided
only on a TPU:

- On a CPU it does not vectorise such a sum: it first writes all products to memory, and copies the
  weights, which a donated step overwrites. Here blocks of products are added to one block of sums,
  which stays in the cache, one tensor after another.
- On a GPU it launches two or three kernels per tensor and writes the products of some. Here each
  tensor is summed in short rows, which XLA fuses with the gradient and the optimizer into one
  kernel per tensor, and the row sums of all tensors are added up at the end.

The measurements are in `experiments/benchmarks`.
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

# On a CPU: the least numbers in a block, enough to split among the cores, few enough that the sums
# stay in the cache; and the most devices that may share a matrix's rows without communication.
_BLOCK, _GROUPS = 2**18, 64
# On a GPU: the most numbers in a row. With 64 XLA fuses every tensor of a ResNet-50, with 128 not.
_ROW = 64


def constraint_sum(
    leaves: Sequence[ConstrainedLeaf], window: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns `sum(multiplier * violation(w, window))`, and a window for computing the gradients.

    The returned window equals the given one, but on a CPU it depends on the sum: XLA then reads the
    weights for the sum before a donated step overwrites them, instead of copying them first.

    Args:
      leaves: the constrained leaves, with the current multipliers.
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
    directly = functools.partial(_sum_directly, products)
    if any(AxisType.Explicit in jax.typeof(w).sharding.mesh.axis_types for w in weights):
        # The other forms reshape, which explicit shardings need not allow.
        return directly(weights, scales, multipliers, window)
    in_rows = functools.partial(_sum_in_rows, products)
    by_platform: dict[str, Form] = {
        "cpu": functools.partial(_sum_in_blocks, products),
        "cuda": in_rows,
        "rocm": in_rows,
    }
    return lax.platform_dependent(
        weights, scales, multipliers, window, default=directly, **by_platform
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
    total = jnp.zeros((), float_dtype())
    for product, w, scale, multiplier in zip(products, weights, scales, multipliers, strict=True):
        total += jnp.sum(product(w, scale, multiplier, window))
    return total, window


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
        # Rows shorter than 8 are not worth a kernel of their own.
        rows = (*values.shape[:-1], last // row, row) if row >= 8 else (1, values.size)
        values = jnp.sum(values.reshape(rows), axis=-1).reshape(-1)
        # A gather is fused, and keeps the sharding of one tensor from spreading to the others.
        sums.append(values.at[jnp.arange(values.size)].get(mode="promise_in_bounds"))
    # Without the barrier XLA sums before it concatenates, with a kernel or two per tensor.
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
        # Never true, which XLA does not know: it makes each tensor wait for the one before, so that
        # they share their memory.
        window = jnp.where(total < -jnp.inf, jnp.nan, window)
    return total, window


def _sum_tensor_in_blocks(
    product: Products, w: jax.Array, scale: jax.Array, multiplier: jax.Array, window: jax.Array
) -> jax.Array:
    per_row = scale.ndim and w.ndim > 1 and scale.shape[-2] != 1
    layout = None if w.ndim < 2 or per_row else _block_layout(w.shape)
    if layout is None:
        return jnp.sum(product(w, scale, multiplier, window))
    outer, blocks = layout[0], layout[3]
    # Without the axes of size 1, for which XLA would choose another layout, and copy.
    axes = [axis for axis, n in enumerate(layout) if n > 1]
    tensors = [array.reshape([layout[axis] for axis in axes]) for array in (w, multiplier)]
    if scale.ndim:
        scale = jnp.broadcast_to(scale, (*w.shape[:-2], 1, scale.shape[-1]))
        scale = scale.reshape(outer, -1, 1, 1, scale.shape[-1])
    block_shape = [n for axis, n in enumerate(layout) if axis not in (0, 3)]

    def add_block(i: jax.Array, sums: jax.Array) -> jax.Array:
        zero = jnp.zeros_like(i)
        start = [(i // blocks, zero, zero, i % blocks, zero, zero)[axis] for axis in axes]
        size = [1 if axis in (0, 3) else layout[axis] for axis in axes]
        weights, multipliers = (
            lax.dynamic_slice(tensor, start, size).reshape(block_shape) for tensor in tensors
        )
        scales = scale[i // blocks] if scale.ndim else scale
        return sums + product(weights, scales, multipliers, window)

    # Depends on the window, so XLA cannot hoist it.
    zero = jnp.where(window < -jnp.inf, jnp.nan, jnp.zeros((), float_dtype()))
    return jnp.sum(lax.fori_loop(0, outer * blocks, add_block, jnp.broadcast_to(zero, block_shape)))


def _block_layout(shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Splits a shape into axes (outer, matrices, groups, blocks, rows, columns).

    A block spans all axes but outer and blocks: several matrices, or part of one. The rows of a
    part are strided so that every device owns part of every block; those of a group are neighbors,
    because memory is read one page at a time. Returns None if there would be only one block.
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
    if count // matrices * blocks == 1:
        return None
    return count // matrices, matrices, groups, blocks, height, columns


def _smallest_divisor(number: int, least: float) -> int:
    """The smallest divisor that is not below `least`, or the number itself."""
    return min((n for n in range(1, number + 1) if number % n == 0 and n >= least), default=number)
