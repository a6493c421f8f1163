"""Large packed files: the memory to load them, and positions beyond 32 bits."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cbp_jax
from cbp_jax.deploy.bits import pack_bits, unpack_bits

MEASURE = """
import resource, sys
import cbp_jax
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
packed = cbp_jax.load_packed(sys.argv[1])
print(packed.nbytes, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def save_large(path, sizes):
    """Codes of binary weights, by bytes per tensor: as weights they would take 32 times as much."""
    tensors = {}
    for i, size in enumerate(sizes):
        codes, scale, shape = np.full(size, i, np.uint8), np.array(1, np.float32), (8 * size,)
        tensors[f"layer{i}"] = cbp_jax.PackedTensor(
            codes, scale, cbp_jax.binary(), shape, "float32"
        )
    cbp_jax.save_packed(path, cbp_jax.Packed(tensors))


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss differs")
@pytest.mark.parametrize(
    "sizes",
    [[50_000_000] * 4, pytest.param([1_200_000_000, 1_200_000_000], marks=pytest.mark.slow)],
    ids=["200 MB", "2.4 GB"],
)
def test_memory_of_loading(sizes, tmp_path):
    path = tmp_path / "large"
    save_large(path, sizes)
    assert path.stat().st_size > sum(sizes)
    options = {"stdout": subprocess.PIPE, "text": True, "check": True, "timeout": 600}
    run = subprocess.run([sys.executable, "-c", MEASURE, str(path)], **options)
    nbytes, used = map(int, run.stdout.split())
    assert nbytes == sum(sizes) + 4 * len(sizes)
    assert used <= nbytes + max(sizes) + 20_000_000
    path.unlink()


@pytest.mark.slow
def test_positions_of_bits_beyond_32_bits():
    """Of 2^28 + 3 codes of 9 bits."""
    size, bits = 2**28 + 3, 9
    codes = jnp.arange(size, dtype=jnp.uint32) % 512
    packed = jax.jit(pack_bits, static_argnums=1)(codes, bits)
    assert packed.size == (size * bits + 7) // 8
    assert jnp.array_equal(jax.jit(unpack_bits, static_argnums=(1, 2))(packed, bits, size), codes)
