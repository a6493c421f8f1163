"""Small GGUF files: exported from one kernel or a tree, and read back."""

import numpy as np
import pytest

import cbp_jax
from cbp_jax.deploy.gguf_blocks import unpack_q1_0

gguf = pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[test]"')

LLAMA = {"general.architecture": "llama"}
HALF = b"\x00\x38"  # 0.5 as a float16 number, least significant byte first
CONSTRAINTS = {
    "Q1_0": cbp_jax.binary(),
    "TQ2_0": cbp_jax.ternary(),
    "TQ1_0": cbp_jax.ternary(),
    "Q4_0": cbp_jax.two_bit_shift(),
}


def normal(*shape, seed=0, scale=0.05):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def link(constraint, mask=None, **options):
    options = {"scale_fn": cbp_jax.float16_scale} | options
    return cbp_jax.cbp(constraint, mask=mask and cbp_jax.select(include=mask), **options)


def export(path, params, state, names, **options):
    return cbp_jax.export_gguf(path, params, state, names=names, **{"metadata": LLAMA, **options})


def export_kernel(path, kernel, constraint="ternary", name="blk.0.ffn_up.weight", **options):
    """Exports a network of one kernel; returns the deviation and its weights on their levels."""
    own = {key: options.pop(key) for key in ("scale_axis", "scale_fn") if key in options}
    params = {"up": {"kernel": kernel}}
    state = link(constraint, **own).init(params)
    deviation = export(path, params, state, {"up/kernel": name}, **options)
    return deviation, np.asarray(cbp_jax.quantize(params, state)["up"]["kernel"])


def read(path):
    """The tensors of a file by name: their type and their weights."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            unpack_q1_0(tensor.data)
            if tensor.tensor_type.name == "Q1_0"
            else gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


def assert_same_bits(got, wanted):
    wanted = np.asarray(wanted).astype(np.float32)
    assert got.shape == wanted.shape
    assert np.array_equal(got.view(np.uint32), np.ascontiguousarray(wanted).view(np.uint32))
