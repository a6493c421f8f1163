"""Codes of a few bits, packed into bytes.

Code `i` is bits `i * bits` to `(i + 1) * bits - 1` of a string of bits, whose bit `j` is bit
`j % 8` of byte `j // 8`, the least significant being 0. Each code starts with its least significant
bit, and the unused bits of the last byte are 0. With three bits per code:

    byte 0                    byte 1
    bit 0 1 2 3 4 5 6 7       bit 0 1 2 3 4 5 6 7
        a a a b b b c c           c d d d e e e f
"""

import math

import jax
import jax.numpy as jnp


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes below `2**bits`, shape=(n,), into uint8, shape=(ceil(n * bits / 8),)."""
    group, width = _codes_per_bytes(bits)
    padded = jnp.pad(codes.astype(jnp.uint32), (0, -codes.size % group)).reshape(-1, group)
    columns = []
    for byte in range(width):
        value = jnp.zeros(padded.shape[:1], jnp.uint32)
        for i in range(group):
            shift = i * bits - 8 * byte  # of code i's first bit within this byte
            if -bits < shift < 8:
                value |= padded[:, i] << shift if shift >= 0 else padded[:, i] >> -shift
        columns.append(value.astype(jnp.uint8))
    return jnp.stack(columns, axis=1).reshape(-1)[: (codes.size * bits + 7) // 8]


def unpack_bits(packed: jax.Array, bits: int, size: int) -> jax.Array:
    """Unpacks the first `size` codes, shape=(size,), into the smallest unsigned dtype."""
    group, width = _codes_per_bytes(bits)
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16 if bits <= 16 else jnp.uint32
    needed = -(-size // group) * width
    grouped = jnp.pad(packed, (0, needed - packed.size)).reshape(-1, width)
    columns = []
    for i in range(group):
        first, shift = divmod(i * bits, 8)
        value = jnp.zeros(grouped.shape[:1], jnp.uint32)
        for byte in range(first, (i * bits + bits - 1) // 8 + 1):
            offset = 8 * (byte - first) - shift
            part = grouped[:, byte].astype(jnp.uint32)
            value |= part << offset if offset >= 0 else part >> -offset
        columns.append((value & (2**bits - 1)).astype(dtype))
    return jnp.stack(columns, axis=1).reshape(-1)[:size]


def _codes_per_bytes(bits: int) -> tuple[int, int]:
    """The smallest number of codes that fills whole bytes, and the number of bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
