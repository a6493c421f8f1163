"""Codes of a few bits in a string of bytes.

Code `i` is bits `i * bits` to `(i + 1) * bits - 1` of the string, and bit `j` of the string is bit
`j % 8` of byte `j // 8`, the least significant being 0. Bits that are left over in the last byte
are 0. With three bits a code:

    byte 0                    byte 1
    bit 0 1 2 3 4 5 6 7       bit 0 1 2 3 4 5 6 7
        a a a b b b c c           c d d d e e e f         of each code the least significant bit
        comes first
"""

import math

import jax
import jax.numpy as jnp


def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Codes below `2**bits`, shape=(n,), as a string of bits, shape=(ceil(n * bits / 8),), dtype=uint8."""
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
    """The first `size` codes of a string of bits, shape=(size,), in the smallest unsigned dtype."""
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
    """The smallest number of codes that fill whole bytes, and how many bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common
