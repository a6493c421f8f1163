"""Packed files can be read from their description alone, and damage to them is noticed."""

import functools
import json
import os
import struct
import subprocess
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

import cbp_jax
from cbp_jax.deploy import files, packed_file

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


@pytest.fixture
def path(tmp_path):
    cbp_jax.save_packed(tmp_path / "weights.safetensors", PACKED)
    return tmp_path / "weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def content(folder):
    cbp_jax.save_packed(folder / "weights.safetensors", PACKED)
    return (folder / "weights.safetensors").read_bytes()


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


# Damage


def assert_refused(path, content, message):
    path.write_bytes(content)
    with pytest.raises(cbp_jax.PackedError, match=message):
        cbp_jax.load_packed(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        cbp_jax.load_packed(tmp_path / "nothing_here")
    with pytest.raises(FileNotFoundError):
        cbp_jax.load_packed(tmp_path)


def last_bytes(content):
    """Where the last byte of each tensor is, of the tensors that have any."""
    header, data = header_of(content)
    del header["__metadata__"]
    offsets = {name: entry["data_offsets"] for name, entry in header.items()}
    start = len(content) - len(data)
    return {name: start + end - 1 for name, (begin, end) in offsets.items() if begin < end}


def test_one_changed_bit_of_any_tensor_is_noticed(content, path):
    for name, last in last_bytes(content).items():
        damaged = bytearray(content)
        damaged[last] ^= 0x10
        assert_refused(path, damaged, repr(name.removesuffix(".codes").removesuffix(".scale")))


def test_truncation_is_noticed(content, path):
    for name, last in last_bytes(content).items():
        assert_refused(path, content[:last], f"is truncated in tensor '{name}'")
    start = len(content) - len(header_of(content)[1])
    for end in (0, 5, 8, 100, start - 1):
        assert_refused(path, content[:end], "is damaged")


def test_trailing_bytes_are_noticed(content, path):
    tensors = last_bytes(content)
    last = max(tensors, key=tensors.get)
    assert_refused(path, content + b"abc", f"3 bytes follow its last tensor, '{last}'")


def test_other_versions_and_formats(content, path):
    header, data = header_of(content)
    header["__metadata__"]["version"] = "2"
    message = "version '2', and this cbp_jax reads version '1'"
    assert_refused(path, with_header(header, data), message)
    safetensors.numpy.save_file({"kernel": np.ones(3)}, path)
    assert_refused(path, path.read_bytes(), "holds no packed weights")


def test_missing_and_unknown_tensors(content, path):
    header, data = header_of(content)
    renamed = {name.replace("conv/bias", "conv/other"): entry for name, entry in header.items()}
    assert_refused(path, with_header(renamed, data), "tensor 'conv/bias' is missing")
    undescribed = with_entries(content, lambda e: e.pop("conv/bias"))
    assert_refused(path, undescribed, "its tensor 'conv/bias' is not described")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [3, 3, 4, 6]}, "number of bytes"),
        ({"shape": [3, 3, 4, -5]}, "shape"),
        ({"shape": [3, 3, 4, 2.5]}, "shape"),
        ({"shape": [2**62, 2**62, 4, 5]}, "number of bytes"),
        ({"shape": [36, 5]}, "number of axes|shape of the scale|broadcast"),
        ({"shape": [5, 4, 3, 3]}, "shape of the scale|broadcast"),
        ({"shape": None}, "NoneType"),
        ({"bits": 2}, "bits is 2, and 3 was expected"),
        ({"levels": [-1.0, 1.0]}, "bits"),
        ({"levels": [-1.0, -0.5, 0.0, 0.5, 1.0]}, "beyond its 5 levels"),
        ({"levels": [1.0, 0.0, -1.0]}, "strictly increasing"),
        ({"levels": "abc"}, "float"),
        ({"levels": [-1e400, 0.0]}, "finite|Infinity"),
        ({"constraint": 3}, "name"),
        ({"dtype": "float64"}, "dtype of the scale"),
        ({"dtype": "nonsense"}, "nonsense"),
        ({"scale_axis": [0]}, "scale_axis"),
        ({"crc32": "00000000"}, "check sum"),
    ],
)
def test_descriptions_that_do_not_fit(content, path, change, message):
    changed = with_entries(content, lambda e: e["conv/kernel"].update(change))
    assert_refused(path, changed, f"tensor 'conv/kernel': .*({message})")


def test_bits_after_the_last_code(path, content):
    def change(entries):  # of 5 x 7 codes of five bits: five bits are left in the last byte
        codes = np.array(PACKED.tensors["head/kernel"].codes)
        codes[-1] |= 0x80
        crc = zlib.crc32(PACKED.tensors["head/kernel"].scale.tobytes(), zlib.crc32(codes.tobytes()))
        entries["head/kernel"]["crc32"] = f"{crc:08x}"

    header, data = header_of(with_entries(content, change))
    data = bytearray(data)
    data[header["head/kernel.codes"]["data_offsets"][1] - 1] |= 0x80
    message = "'head/kernel': there are bits after its last code"
    assert_refused(path, with_header(header, bytes(data)), message)


def test_changed_description(content, path):
    changed = content.replace(b"two_bit_shift", b"two_bit_shaft")
    assert_refused(path, changed, "description of its tensors, in the header, has changed")


def test_deeply_nested_header(path):
    text = "[" * 100_000
    metadata = {"format": "cbp_jax packed weights", "version": "1", "tensors": text}
    metadata["tensors_crc32"] = f"{zlib.crc32(text.encode()):08x}"
    assert_refused(path, with_header({"__metadata__": metadata}, b""), "not a JSON object")


MUTATIONS = st.one_of(
    st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("delete"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.none()),
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("copy"), st.floats(0, 1), st.integers(1, 200)),
    st.tuples(st.just("digit"), st.floats(0, 1), st.integers(0, 9)),
)


def mutate(content, kind, where, what):
    at = int(where * (len(content) - 1))
    if kind == "set":
        return content[:at] + what + content[at + len(what) :]
    if kind == "insert":
        return content[:at] + what + content[at:]
    if kind == "delete":
        return content[:at] + content[at + what :]
    if kind == "cut":
        return content[:at]
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << what]) + content[at + 1 :]
    if kind == "copy":
        return content[:at] + content[: -what - 1 : -1] + content[at:]
    # Sizes and offsets: nearly all digits are in the header.
    digits = [i for i, byte in enumerate(content) if 48 <= byte < 58] or [0]
    at = digits[int(where * (len(digits) - 1))]
    return content[:at] + str(what).encode() + content[at + 1 :]


def fuzz(mutations, of_description, content, folder):
    changed = content
    if of_description:
        header, data = header_of(content)
        text = header["__metadata__"]["tensors"].encode()
        for mutation in mutations:
            text = mutate(text, *mutation) or b"{}"
        header["__metadata__"]["tensors"] = text.decode(errors="replace")
        crc = zlib.crc32(header["__metadata__"]["tensors"].encode())
        header["__metadata__"]["tensors_crc32"] = f"{crc:08x}"
        changed = with_header(header, data)
    else:
        for mutation in mutations:
            changed = mutate(changed, *mutation) or b"x"
    path = folder / "fuzz.safetensors"
    path.write_bytes(changed)
    try:
        loaded = cbp_jax.load_packed(path)
    except cbp_jax.PackedError:
        return
    assert of_description or loaded == PACKED


FUZZ = given(mutations=st.lists(MUTATIONS, min_size=1, max_size=3), of_description=st.booleans())
OFTEN = settings(max_examples=500, deadline=2000, database=None)


@FUZZ
@example(mutations=[("set", 0.0, b"\xff" * 4)], of_description=False)
@OFTEN
def test_a_damaged_file_is_read_as_it_was_or_refused(mutations, of_description, content, folder):
    """Refused with our own error; half of the files are given a checksum that agrees."""
    fuzz(mutations, of_description, content, folder)


@pytest.mark.slow
@FUZZ
@settings(OFTEN, max_examples=10_000)
def test_each_of_ten_thousand_damaged_files(mutations, of_description, content, folder):
    fuzz(mutations, of_description, content, folder)
