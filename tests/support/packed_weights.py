"""A network's packed weights, and the parts of a packed file."""

import json
import struct
import zlib

import jax.numpy as jnp
import numpy as np

import cbp_jax

rng = np.random.default_rng(0)
PARAMS = {
    "conv": {
        "kernel": jnp.asarray(rng.normal(size=(3, 3, 4, 5)), jnp.float32),
        "bias": jnp.zeros(5),
    },
    "empty": {"kernel": jnp.zeros((0, 3))},
    "head": {
        "kernel": jnp.asarray(rng.normal(size=(5, 7)), jnp.bfloat16),
        "bias": jnp.ones(7, jnp.bfloat16),
    },
    "one": {"kernel": jnp.full((1, 1), 0.3)},
    "steps": jnp.array(3),
}
CONSTRAINT = {
    "conv/.*": "two_bit_shift",
    "one/.*": "binary",
    "empty/.*": "binary",
    "head/.*": cbp_jax.uniform(5),
}
STATE = cbp_jax.cbp(CONSTRAINT, scale_axis=-1).init(PARAMS)
PACKED = cbp_jax.pack(PARAMS, STATE, round=True)


def header_of(content):
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_entries(content, change):
    """The file with another description of its tensors, and a checksum that agrees."""
    header, data = header_of(content)
    metadata = header["__metadata__"]
    entries = json.loads(metadata["tensors"])
    change(entries)
    metadata["tensors"] = json.dumps(entries)
    metadata["tensors_crc32"] = f"{zlib.crc32(metadata['tensors'].encode()):08x}"
    return with_header(header, data)
