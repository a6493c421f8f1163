"""Packed files can be read from their description alone, and are replaced at once or not at all."""

import functools
import json
import os
import subprocess
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
from packed_weights import PACKED, PARAMS, STATE, header_of

import cbp_jax
from cbp_jax.deploy import files, packed_file

rng = np.random.default_rng(0)


@pytest.fixture
def path(tmp_path):
    cbp_jax.save_packed(tmp_path / "weights.safetensors", PACKED)
    return tmp_path / "weights.safetensors"


@pytest.fixture
def content(path):
    return path.read_bytes()


# What is written


def test_saved_and_loaded(path):
    loaded = cbp_jax.load_packed(path)
    assert loaded == PACKED
    assert list(loaded.tensors) == list(PACKED.tensors)
    trees = cbp_jax.unpack(loaded, PARAMS), cbp_jax.quantize(PARAMS, STATE)
    for a, b in zip(*map(jax.tree.leaves, trees), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_any_safetensors_reader_opens_it(path):
    with safetensors.safe_open(path, "np") as file:
        assert {"conv/kernel.codes", "conv/kernel.scale", "conv/bias"} <= set(file.keys())
        assert file.metadata()["version"] == "1"


def read_as_described(content):
    """Reads a file by the description in `packed_file.py` alone, one weight at a time."""
    header, data = header_of(content)
    metadata = header.pop("__metadata__")
    assert (metadata["format"], metadata["version"]) == ("cbp_jax packed weights", "1")
    assert metadata["tensors_crc32"] == f"{zlib.crc32(metadata['tensors'].encode()):08x}"

    def raw(name):
        begin, end = header[name]["data_offsets"]
        return data[begin:end]

    tensors = {}
    for name, entry in json.loads(metadata["tensors"]).items():
        dtype, shape = np.dtype(getattr(ml_dtypes, entry["dtype"], entry["dtype"])), entry["shape"]
        if "constraint" not in entry:
            assert entry["crc32"] == f"{zlib.crc32(raw(name)):08x}"
            tensors[name] = np.frombuffer(raw(name), dtype).reshape(shape)
            continue
        codes, scale = raw(f"{name}.codes"), raw(f"{name}.scale")
        assert entry["crc32"] == f"{zlib.crc32(codes + scale):08x}"
        bits, levels = entry["bits"], entry["levels"]
        values = []
        for i in range(int(np.prod(shape))):
            bit = i * bits
            byte = bit // 8
            two = codes[byte] | (codes[byte + 1] << 8 if bit % 8 + bits > 8 else 0)
            values.append(levels[two >> (bit % 8) & ((1 << bits) - 1)])
        scales = np.frombuffer(scale, np.float32).reshape(header[f"{name}.scale"]["shape"])
        kept = [axis for axis, n in enumerate(scales.shape) if n > 1]
        assert kept == [axis for axis in entry["scale_axis"] if shape[axis] > 0]
        tensors[name] = (np.array(values, np.float32).reshape(shape) * scales).astype(dtype)
    return tensors


def test_can_be_read_from_its_description(content):
    quantized = cbp_jax.quantize(PARAMS, STATE)
    read = read_as_described(content)
    assert set(read) == set(PACKED.tensors)
    for layer in ("conv", "empty", "head", "one"):
        for leaf, expected in quantized[layer].items():
            np.testing.assert_array_equal(read[f"{layer}/{leaf}"], np.asarray(expected))
            assert read[f"{layer}/{leaf}"].dtype == expected.dtype
    assert read["steps"] == 3


C_READER = r"""
#include <stdio.h>
#include <stdlib.h>
/* codes bits size level... : prints the levels of the codes on standard input */
int main(int argc, char **argv) {
    unsigned bits = atoi(argv[1]); size_t size = atoi(argv[2]);
    static unsigned char codes[1 << 20];
    fread(codes, 1, sizeof codes, stdin);
    for (size_t i = 0; i < size; i++) {
        size_t bit = i * bits, byte = bit / 8;
        unsigned two = codes[byte] | (bit % 8 + bits > 8 ? codes[byte + 1] << 8 : 0);
        printf("%s\n", argv[3 + (two >> (bit % 8) & ((1u << bits) - 1))]);
    }
}
"""


def test_the_lines_of_c_read_it(tmp_path):
    """Those of the description, compiled."""
    starts = ("    size_t bit", "    unsigned two")
    lines = [line for line in packed_file.__doc__.splitlines() if line.startswith(starts)]
    assert len(lines) == 2
    assert all(line.strip() in C_READER for line in lines)
    reader = tmp_path / "reader"
    reader.with_suffix(".c").write_text(C_READER)
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    try:
        run(["cc", "-o", reader, reader.with_suffix(".c")])
    except FileNotFoundError:
        pytest.skip("no C compiler")
    for name in ("conv/kernel", "head/kernel"):
        tensor = PACKED.tensors[name]
        levels = map(repr, tensor.constraint.levels)
        arguments = [str(tensor.constraint.bits), str(tensor.size), *levels]
        read = run([reader, *arguments], input=tensor.codes.tobytes())
        layer, leaf = name.split("/")
        levels = np.array(read.stdout.decode().split(), np.float32).reshape(tensor.shape)
        expected = np.asarray(cbp_jax.quantize(PARAMS, STATE)[layer][leaf])
        np.testing.assert_array_equal((levels * tensor.scale).astype(expected.dtype), expected)


@pytest.mark.parametrize(
    ("constraint", "weights"),
    [("binary", 200_000), ("ternary", 100_352), ("two_bit_shift", 100_352)],
)
def test_size_of_the_whole_file(constraint, weights, tmp_path):
    params = {"kernel": jnp.asarray(rng.normal(size=(weights // 64, 64)), jnp.float32)}
    state = cbp_jax.cbp(constraint).init(params)
    cbp_jax.save_packed(tmp_path / "file", cbp_jax.pack(params, state, round=True))
    ideal = weights * cbp_jax.get_constraint(constraint).bits / 8
    assert ideal <= (tmp_path / "file").stat().st_size <= 1.02 * ideal


# Writing


def test_a_crash_leaves_the_old_file(path, monkeypatch):
    before, params = path.read_bytes(), {"kernel": jnp.ones((2, 2))}
    other = cbp_jax.pack(params, cbp_jax.cbp("binary").init(params))

    def torn(specs, name, metadata):
        Path(name).write_bytes(b"half of it")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "serialize_file", torn)
        with pytest.raises(OSError, match="no space left"):
            cbp_jax.save_packed(path, other)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cbp_jax.save_packed(path, other)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]
    cbp_jax.save_packed(path, other)
    assert cbp_jax.load_packed(path) == other
    assert os.listdir(path.parent) == [path.name]


def test_the_new_file_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    calls = []
    sync, replace = files._sync, Path.replace
    monkeypatch.setattr(files, "_sync", lambda p: (calls.append("sync"), sync(p)))
    monkeypatch.setattr(Path, "replace", lambda *args: (calls.append("replace"), replace(*args))[1])
    cbp_jax.save_packed(tmp_path / "file", PACKED)
    assert calls == ["sync", "replace", "sync"]


def test_permissions_are_those_of_a_new_file(path):
    path.with_name("plain").touch()
    assert path.stat().st_mode == path.with_name("plain").stat().st_mode


def test_refuses_what_the_file_cannot_hold(tmp_path):
    params = {"kernel": jnp.ones((2, 2))}
    state = cbp_jax.cbp("binary").init(params)
    for name, leaf, message in (
        ("odd", jnp.ones(3, jnp.int4), "'odd' is int4"),
        ("kernel.codes", jnp.ones(3), r"already has a tensor 'kernel\.codes'"),
        ("__metadata__", jnp.ones(3), "__metadata__"),
    ):
        packed = cbp_jax.pack({**params, name: leaf}, state)
        with pytest.raises(ValueError, match=message):
            cbp_jax.save_packed(tmp_path / "file", packed)
    assert not any(tmp_path.iterdir())
