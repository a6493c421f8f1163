"""Packed files and places that a stranger made up: documented errors, in no time and memory."""

import json
import os
import socket
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import cbp_jax

PARAMS = {"dense": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.zeros(4)}}
PACKED = cbp_jax.pack(PARAMS, cbp_jax.ste("ternary").init(PARAMS), round=True)


def write(path, arrays, entries):
    """A file with a description that is intact, whatever it says."""
    text = entries if isinstance(entries, str) else json.dumps(entries)
    metadata = {
        "format": "cbp_jax packed weights",
        "version": "1",
        "tensors": text,
        "tensors_crc32": f"{zlib.crc32(text.encode()):08x}",
    }
    safetensors.numpy.save_file(arrays, path, metadata)
    return path


def of_codes(shape, levels=(-1.0, 1.0), scale_shape=(), **changes):
    """The arrays and the entry of one constrained tensor without weights."""
    codes, scale = np.zeros(0, np.uint8), np.ones(scale_shape, np.float32)
    entry = {
        "constraint": "binary",
        "levels": list(levels),
        "bits": 1,
        "shape": shape,
        "dtype": "float32",
        "scale_axis": [axis for axis, n in enumerate(scale_shape) if n != 1],
        "crc32": f"{zlib.crc32(scale.tobytes()):08x}",
        **changes,
    }
    return {"w.codes": codes, "w.scale": scale}, {"w": entry}


@pytest.mark.parametrize(
    "shape",
    [[2**62, 0], [10**10, 0], [2**31, 2**31, 0], [0] * 65, [True, 0], [-1, 0], [1.0, 0], 7, None],
)
def test_shapes_that_no_tensor_has(shape, tmp_path):
    arrays, entries = of_codes(shape)
    with pytest.raises(cbp_jax.PackedError, match="tensor 'w'"):
        cbp_jax.load_packed(write(tmp_path / "w", arrays, entries))


def test_an_empty_tensor_costs_nothing(tmp_path):
    arrays, entries = of_codes([10**9, 0])
    packed = cbp_jax.load_packed(write(tmp_path / "w", arrays, entries))
    assert cbp_jax.unpack(packed)["w"].shape == (10**9, 0)


@pytest.mark.parametrize("entry", [None, 3, "codes", [], True])
def test_entries_that_are_no_objects(entry, tmp_path):
    arrays, _ = of_codes([0])
    with pytest.raises(cbp_jax.PackedError, match="tensor 'w' is described by"):
        cbp_jax.load_packed(write(tmp_path / "w", arrays, {"w": entry}))


def test_a_scale_of_many_axes(tmp_path):
    arrays, entries = of_codes([0] * 3, scale_shape=(1,) * 40)
    with pytest.raises(cbp_jax.PackedError, match="tensor 'w'"):
        cbp_jax.load_packed(write(tmp_path / "w", arrays, entries))


def test_paths_of_a_thousand_keys(tmp_path):
    name = "/".join(["a"] * 1000)
    array = np.zeros(1, np.float32)
    entry = {"shape": [1], "dtype": "float32", "crc32": f"{zlib.crc32(array.tobytes()):08x}"}
    with pytest.raises(cbp_jax.PackedError, match="a path of over 100 keys"):
        cbp_jax.load_packed(write(tmp_path / "w", {name: array}, {name: entry}))
    with pytest.raises(ValueError, match="a path of over 100 keys: shorten it"):
        cbp_jax.save_packed(tmp_path / "w", cbp_jax.Packed({name: array}))


def test_what_is_saved_is_loaded(tmp_path):
    """At the bounds that a reader has."""
    tensors = {"/".join(["a"] * 100): np.ones(1, np.float32), "b": np.ones((1,) * 64, np.float32)}
    packed = cbp_jax.Packed(tensors)
    cbp_jax.save_packed(tmp_path / "w", packed)
    assert cbp_jax.load_packed(tmp_path / "w") == packed


@pytest.mark.parametrize(
    "names", [("a", "a/b"), ("a/b", "a"), ("", "a"), ("a", ""), ("a/b/c", "a/b")]
)
def test_names_that_no_dictionary_has(names):
    packed = cbp_jax.Packed({name: np.zeros(1, np.float32) for name in names})
    with pytest.raises(cbp_jax.PackedError, match="give a template"):
        cbp_jax.unpack(packed)


def test_a_tree_that_is_one_leaf():
    assert cbp_jax.unpack(cbp_jax.Packed({"": np.ones(1, np.float32)})).shape == (1,)


def test_the_same_weights_give_the_same_bytes(tmp_path):
    contents = set()
    for count in range(20):
        path = tmp_path / str(count)
        cbp_jax.save_packed(path, PACKED)
        assert cbp_jax.load_packed(path) == PACKED
        contents.add(path.read_bytes())
    assert len(contents) == 1


def test_places_where_no_file_can_be(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder: make it first"):
        cbp_jax.save_packed(tmp_path / "none" / "w", PACKED)
    with pytest.raises(IsADirectoryError, match="give the path of a file"):
        cbp_jax.save_packed(tmp_path, PACKED)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.raises(OSError, match="is no regular file"):
            cbp_jax.save_packed(tmp_path / "socket", PACKED)
    assert sorted(os.listdir(tmp_path)) == ["socket"]


def test_a_full_disk(tmp_path, monkeypatch):
    def serialize(specs, path, metadata):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.serialize_file", serialize)
    with pytest.raises(OSError, match="I/O error: No space left"):
        cbp_jax.save_packed(tmp_path / "w", PACKED)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("other", [{}, PARAMS, None, 3])
def test_what_is_not_packed(other, tmp_path):
    with pytest.raises(TypeError, match="the result of pack, got"):
        cbp_jax.save_packed(tmp_path / "w", other)
    with pytest.raises(TypeError, match="the result of pack, got"):
        cbp_jax.unpack(other)


def test_weights_are_not_unpacked_to_integers():
    with pytest.raises(TypeError, match="dtype must be floating"):
        cbp_jax.unpack(PACKED, dtype="int32")
