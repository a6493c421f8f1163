"""Damage to packed files is noticed, and named where that is possible."""

import zlib

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_weights import PACKED, header_of, with_entries, with_header

import cbp_jax


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="module")
def content(folder):
    cbp_jax.save_packed(folder / "weights.safetensors", PACKED)
    return (folder / "weights.safetensors").read_bytes()


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
        ({"levels": "abc"}, "numbers as levels"),
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
OFTEN = settings(max_examples=500, deadline=None, database=None)


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
