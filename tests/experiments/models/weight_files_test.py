"""Weight files that strangers made: documented errors, in bounded time and memory."""

import json
import re
import resource
import struct
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("flax", reason='needs the extra: pip install -e ".[test]"')

import safetensors.numpy
from common import models
from common.models import torch_weights
from flax import nnx

NETWORK = nnx.eval_shape(lambda: models.SmallConvNet(3, 2, rngs=nnx.Rngs(0)))
TREES = jax.tree.map(
    lambda leaf: np.linspace(1, 2, leaf.size, dtype=np.float32).reshape(leaf.shape),
    models.split_model(NETWORK)[1:],
)
ARRAYS = torch_weights.to_torch(NETWORK, *TREES)
GIGABYTE = 1 << 30


def load(path):
    return torch_weights.load_torch(path, NETWORK)


@pytest.fixture
def little_memory():
    """Two gigabytes more than there are; what is not touched counts as well."""
    usual = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * GIGABYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, usual[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, usual)


def write_safetensors(path, changes):
    """Writes the network's arrays, with other entries for some of them, and without data."""
    header, content, start = {}, b"", 0
    for name, array in ARRAYS.items():
        dtype, shape, data = changes.get(name, ("F32", array.shape, array.tobytes()))
        offsets = [start, start := start + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        content += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BOOL", "C64", "U16"])
def test_safetensors_of_other_dtypes(dtype, tmp_path):
    """numpy lacks some of them, so they are listed before they are read."""
    size = {"C64": 24, "U16": 6}.get(dtype, 3)
    write_safetensors(tmp_path / "w.safetensors", {"head.bias": (dtype, (3,), bytes(size))})
    with pytest.raises(ValueError, match=rf"Net:\n  other dtype: head.bias, found {dtype}, expect"):
        load(tmp_path / "w.safetensors")


def test_safetensors_of_other_shapes_are_not_read(tmp_path, little_memory):
    """The file is sparse: 1.5 GB long, it has a few kilobytes on the disk."""
    path, rows = tmp_path / "w.safetensors", GIGABYTE // 8
    text = json.dumps(
        {"head.weight": {"dtype": "F32", "shape": [rows, 3], "data_offsets": [0, 12 * rows]}}
    ).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 12 * rows)
    with pytest.raises(ValueError, match=rf"other shape: head.weight, found \({rows}, 3\)"):
        load(path)


def test_safetensors_of_float64_beyond_float32(tmp_path):
    arrays = ARRAYS | {"head.bias": np.array([1, 1e300, -1e300])}
    safetensors.numpy.save_file(arrays, tmp_path / "w.safetensors")
    with (
        pytest.warns(RuntimeWarning, match="overflow"),
        pytest.raises(ValueError, match=r"Net:\n  not finite: head.bias, 2 of 3 values$"),
    ):
        load(tmp_path / "w.safetensors")


class TestPickles:
    """Each of these files raised another error, filled the memory or ended the process."""

    @pytest.fixture(autouse=True)
    def import_torch(self):
        self.torch = pytest.importorskip("torch", reason="needs torch: pip install torch")

    def save(self, path, changes=None, **options):
        torch = self.torch
        tensors = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
        torch.save(tensors | (changes or {}), path, **options)
        return path

    def rewrite(self, path, change, compression=zipfile.ZIP_STORED):
        """Changes the files of an archive: a function of name and content."""
        with zipfile.ZipFile(path) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in contents.items():
                archive.writestr(name, change(name, content))

    @pytest.mark.parametrize("old", [False, True])
    def test_what_is_saved_is_loaded(self, old, tmp_path):
        path = self.save(tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
        jax.tree.map(np.testing.assert_array_equal, load(path), tuple(TREES))

    def test_views_and_parameters(self, tmp_path):
        torch = self.torch
        weight = torch.from_numpy(ARRAYS["head.weight"])
        view = torch.nn.Parameter(weight.T.contiguous().T)
        half = torch.complex(torch.zeros(3), -torch.from_numpy(ARRAYS["head.bias"])).conj().imag
        assert half.is_neg()
        path = self.save(tmp_path / "w.pth", {"head.weight": view, "head.bias": half})
        jax.tree.map(np.testing.assert_array_equal, load(path), tuple(TREES))

    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (lambda torch: torch.ones(3).to_sparse(), "sparse_coo float32"),
            (lambda torch: torch.ones(3, device="meta"), "meta float32"),
            (lambda torch: torch.quantize_per_tensor(torch.ones(3), 1, 0, torch.qint8), "qint8"),
            (lambda torch: torch.ones(3, dtype=torch.complex64).conj(), "complex64"),
            (lambda torch: torch.ones(3, dtype=torch.complex32), "complex32"),
            (lambda torch: torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
            (lambda torch: torch.ones(3, dtype=torch.bool), "bool"),
            (lambda torch: torch.ones(3, dtype=torch.int64), "int64"),
        ],
    )
    def test_other_tensors(self, make, found, tmp_path):
        path = self.save(tmp_path / "w.pth", {"head.bias": make(self.torch)})
        with pytest.raises(ValueError, match=rf"Net:\n  other dtype: head.bias, found {found}, "):
            load(path)

    def test_tensors_of_other_shapes(self, tmp_path, little_memory):
        """4 TB as float32, and one that has no shape."""
        torch = self.torch
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        large = torch.ones(1, dtype=torch.float16).expand(10**12)
        path = self.save(tmp_path / "w.pth", {"head.bias": large, "head.weight": nested})
        assert path.stat().st_size < 10_000
        with pytest.raises(ValueError, match=r"Net:\n  other shape(.*\n)+  other shape") as error:
            load(path)
        assert "head.bias, found (1000000000000,), expected (3,)" in str(error.value)
        assert "head.weight, found (), expected (3, 4)" in str(error.value)

    def refused(self, path, why):
        with pytest.raises(ValueError, match=r"w\.pth is not a PyTorch checkpoint") as error:
            load(path)
        assert re.search(why, str(error.value.__cause__))

    @pytest.mark.parametrize("old", [False, True])
    @pytest.mark.parametrize(
        ("body", "why"),
        [
            (b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x04\x85R", "it holds a bytearray"),  # 16 GB
            (b")" + 300_000 * b"\x85", "more than 100 deep"),  # hashed by recursion
            (b"(" * 300_000 + b")" + b"t" * 300_000, "more than 100 deep"),
        ],
    )
    def test_pickles_that_end_the_process(self, body, why, old, tmp_path, little_memory):
        path = self.save(tmp_path / "w.pth", {}, _use_new_zipfile_serialization=not old)
        pickle = b"\x80\x02}" + body + b"K\x01s."
        if old:
            number, version, system = (b"\x80\x02K\x01." for _ in range(3))
            path.write_bytes(number + version + system + pickle)
        else:
            self.rewrite(path, lambda name, was: pickle if name.endswith(".pkl") else was)
        self.refused(path, why)

    def test_compressed_archives(self, tmp_path, little_memory):
        path = self.save(tmp_path / "w.pth")
        self.rewrite(path, lambda name, was: was + bytes(10**8), zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 10**7
        self.refused(path, "its archive is compressed")

    def test_attributes_that_hide_methods(self, tmp_path):
        """Both are restored by torch's restricted unpickler."""
        torch = self.torch
        tensor = torch.from_numpy(ARRAYS["head.bias"])
        tensor.detach = 3
        path = self.save(tmp_path / "w.pth", {"head.bias": tensor})
        jax.tree.map(np.testing.assert_array_equal, load(path), tuple(TREES))
        self.rewrite(
            path,
            lambda name, was: (
                b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\x03sb."
                if name.endswith("data.pkl")
                else was
            ),
        )
        with pytest.raises(ValueError, match=r"missing: head\.bias"):
            load(path)
