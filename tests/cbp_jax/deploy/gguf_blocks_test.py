"""Blocks of GGUF: by hand from the layout, and as gguf reads and writes them."""

import numpy as np
import pytest
from gguf_support import HALF, gguf

from cbp_jax.deploy.gguf_blocks import BLOCK_TYPES, Q1_0, pack_rows, unpack_q1_0


def pack_block(name, integers):
    kind = BLOCK_TYPES[name]
    codes = np.searchsorted(kind.integers, integers).astype(np.uint8)
    return pack_rows(kind, codes[None], np.float32([[0.5]]))[0].tobytes()


def ternary_block(**at):
    """Zeros, but for the given places."""
    block = np.zeros(256, np.int8)
    for place, integer in at.items():
        block[int(place[1:])] = integer
    return block


def test_a_block_of_q1_0():
    """The sign of weight w is bit w % 8 of byte w // 8, after the scale."""
    signs = np.full(128, -1)
    signs[[0, 9, 127]] = 1
    assert pack_block("Q1_0", signs) == HALF + b"\x01\x02" + bytes(13) + b"\x80"


def test_a_block_of_tq2_0():
    """Zero is 01 in each pair of bits; pair k of byte i of a half is its weight 32 k + i."""
    block = ternary_block(w0=1, w32=-1, w96=1, w127=-1, w128=-1)
    first = 0b10_01_00_10  # the weights 96, 64, 32 and 0
    last = 0b00_01_01_01  # 127, 95, 63 and 31
    half = [first, *[0x55] * 30, last]
    assert pack_block("TQ2_0", block) == bytes([*half, 0b01_01_01_00, *[0x55] * 31]) + HALF


def test_a_block_of_tq1_0():
    """Zero is the digit 1. Five of them are 121, stored as ceil(121 * 256 / 243) = 128."""
    assert pack_block("TQ1_0", ternary_block()) == bytes([128] * 48 + [127] * 4) + HALF
    # The weights 0, 32, 64, 96 and 128 are digits of byte 0: 2 1 1 1 0 is 201, stored as 212.
    # 160 leads byte 32: 0 1 1 1 1 is 40, as 43. 255 ends byte 51: 1 1 1 2 0 is 123, as 130.
    block = ternary_block(w0=1, w128=-1, w160=-1, w255=1)
    wanted = [212, *[128] * 31, 43, *[128] * 15, *[127] * 3, 130]
    assert pack_block("TQ1_0", block) == bytes(wanted) + HALF


def test_a_block_of_q4_0():
    """Code 8 is 0; byte i has the weight i in its lower half and 16 + i in its upper one."""
    block = np.zeros(32, np.int8)
    block[[0, 16, 31]] = [-8, 7, -1]
    assert pack_block("Q4_0", block) == HALF + bytes([0xF0, *[0x88] * 14, 0x78])


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_blocks_are_those_of_gguf(name):
    integers = np.random.default_rng(0).integers(-1, 2, (7, 512))
    integers[:, ::256] = 1  # a block of zeros has no scale in gguf
    scales = np.float32([[2.0**-k] for k in range(7)])
    packed = pack_rows(BLOCK_TYPES[name], (integers + 1).astype(np.uint8), scales)
    theirs = gguf.quants.quantize(np.float32(integers * scales), gguf.GGMLQuantizationType[name])
    assert np.array_equal(packed, theirs)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "Q4_0"])
def test_gguf_reads_every_integer(name):
    kind = BLOCK_TYPES[name]
    codes = np.random.default_rng(1).integers(0, len(kind.integers), (50, 2 * kind.size))
    packed = pack_rows(kind, codes.astype(np.uint8), np.float32(0.5))
    weights = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
    assert np.array_equal(weights, 0.5 * np.array(kind.integers)[codes])


def test_sizes_are_those_of_gguf():
    for name, kind in BLOCK_TYPES.items():
        block = np.zeros((1, kind.size), np.uint8)
        assert pack_rows(kind, block, np.float32(1)).shape == (1, kind.nbytes)
        sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert sizes == (kind.size, kind.nbytes)


def test_reading_q1_0():
    data = np.frombuffer(HALF + b"\x01" + bytes(15) + b"\x00\xb8" + b"\xff" * 16, np.uint8)
    weights = unpack_q1_0(data.reshape(1, 2 * Q1_0.nbytes))
    assert np.array_equal(weights, [[0.5, *[-0.5] * 255]])
