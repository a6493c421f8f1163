"""The low-bit types of GGUF: blocks of integers along a row, each with one float16 scale.

A weight is `integer * scale`. Its code is the index of the integer among those of the type, from 0
for the lowest, and `w` is its place in the block:

    type   weights  integers  bytes of a block
    Q1_0   128      -1, 1     scale; code w is bit w % 8 of byte w // 8
    TQ2_0  256      -1 to 1   code 128 h + 32 k + i is bits 2k and 2k + 1 of byte 32 h + i; scale
    TQ1_0  256      -1 to 1   32 bytes, 16 bytes, 4 bytes; scale
    Q4_0   32       -8 to 7   scale; code 16 k + i is bits 4k to 4k + 3 of byte i

In TQ1_0 the digits of base 3 are codes: byte i of the first 32 has those of the weights i, 32 + i,
..., 128 + i, the first one leading; byte i of the next 16 those of 160 + 16 k + i; byte i of the
last four those of 240 + 4 k + i, and a 0. A number n of five digits is stored as
`ceil(256 n / 243)`, so that its digits are the carries of multiplications by 3.

Reference: https://github.com/ggml-org/llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_SCALE = np.dtype("<f2")


class BlockType(NamedTuple):
    """A type whose tensors consist of blocks."""

    name: str
    size: int  # weights per block
    integers: tuple[int, ...]
    pack: Callable[[np.ndarray], np.ndarray]  # codes (blocks, size) -> bytes (blocks, ...), uint8
    scale_first: bool
    nbytes: int  # per block


def _pack_1_bit(codes: np.ndarray) -> np.ndarray:
    return np.packbits(codes, axis=-1, bitorder="little")


def _pack_2_bits(codes: np.ndarray) -> np.ndarray:
    quarters = codes.reshape(-1, 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    return np.bitwise_or.reduce(quarters, axis=2).reshape(-1, 64)


def _pack_4_bits(codes: np.ndarray) -> np.ndarray:
    return codes[:, :16] | codes[:, 16:] << 4


def _pack_base_3(codes: np.ndarray) -> np.ndarray:
    parts = (codes[:, :160], 5, 32), (codes[:, 160:240], 5, 16), (codes[:, 240:], 4, 4)
    columns = []
    for part, digits, width in parts:
        weights = np.array([81, 27, 9, 3, 1], np.uint16)[:digits, None]
        number = np.sum(part.reshape(-1, digits, width) * weights, axis=1, dtype=np.uint16)
        columns.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(columns, axis=1)


Q1_0 = BlockType("Q1_0", 128, (-1, 1), _pack_1_bit, True, 18)
TQ2_0 = BlockType("TQ2_0", 256, (-1, 0, 1), _pack_2_bits, False, 66)
TQ1_0 = BlockType("TQ1_0", 256, (-1, 0, 1), _pack_base_3, False, 54)
Q4_0 = BlockType("Q4_0", 32, tuple(range(-8, 8)), _pack_4_bits, True, 18)

# In the order of preference: the fewest bits first, but TQ2_0, which runs faster, before TQ1_0.
BLOCK_TYPES = {kind.name: kind for kind in (Q1_0, TQ2_0, TQ1_0, Q4_0)}


def pack_rows(kind: BlockType, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Packs rows of codes.

    Args:
      kind: the type.
      codes: indices into its `integers`, shape=(..., n), uint8, with n a multiple of its size.
      scale: of the rows, shape=(..., 1) or broadcastable to it.

    Returns:
      Array of shape (..., bytes per row), uint8.
    """
    per_row = codes.shape[-1] // kind.size
    with np.errstate(over="ignore"):  # to infinity
        half = scale.astype(_SCALE)
    scales = np.broadcast_to(half, (*codes.shape[:-1], per_row))
    parts = [
        np.ascontiguousarray(scales).reshape(-1, 1).view(np.uint8),
        kind.pack(codes.reshape(-1, kind.size)),
    ]
    blocks = np.concatenate(parts if kind.scale_first else parts[::-1], axis=1)
    return blocks.reshape(*codes.shape[:-1], per_row * kind.nbytes)


def unpack_q1_0(data: np.ndarray) -> np.ndarray:
    """Returns the weights, shape=(..., n), float32, of rows of Q1_0, which `gguf` cannot read."""
    blocks = data.reshape(-1, Q1_0.nbytes)
    scale = np.ascontiguousarray(blocks[:, :2]).view(_SCALE).astype(np.float32)
    signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    weights = np.where(signs, scale, -scale)
    return weights.reshape(*data.shape[:-1], data.shape[-1] // Q1_0.nbytes * Q1_0.size)
