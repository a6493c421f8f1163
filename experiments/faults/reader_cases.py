"""The files that readers are tried on: a valid one, and one that was changed, of each kind.

A function `..._case` writes a file into a folder, and returns a function that reads it, and says
whether what it got is right. Where a format has a check sum that was not renewed, it must equal
what was saved; elsewhere it must be well-formed.
"""

import contextlib
import dataclasses
import functools
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import models
from common.config import base_config
from common.input.decode import decode_eval, decode_train
from common.models import torch_weights
from common.report.workdir import Summary, read_metrics
from common.training.checkpoints import Checkpoints
from common.training.restore import read_config
from flax import nnx
from PIL import Image

import cbp_jax
from faults import mutations
from faults.mutations import Rng, damage

Read = Callable[[], bool]

_UNCHANGED = 0.02  # of the cases: a reader that refused everything would show


# Packed files.


@functools.cache
def _packed() -> tuple[cbp_jax.Packed, bytes]:
    params = {
        "conv": {"kernel": jnp.linspace(-1, 1, 54).reshape(3, 3, 2, 3)},
        "dense": {"kernel": jnp.linspace(-2, 1, 20).reshape(5, 4), "bias": jnp.arange(4.0)},
    }
    constraint = {"conv/kernel": "ternary", "dense/kernel": "two_bit_shift"}
    state = cbp_jax.ste(constraint, scale_axis=-1).init(params)
    packed = cbp_jax.pack(params, state, round=True)
    with tempfile.TemporaryDirectory() as folder:
        cbp_jax.save_packed(Path(folder) / "w", packed)
        return packed, (Path(folder) / "w").read_bytes()


def packed_case(rng: Rng, folder: Path) -> Read:
    """Tries packed weights."""
    saved, data = _packed()
    path, kind = folder / "w.safetensors", rng.integers(4)
    if rng.random() > _UNCHANGED:
        if kind == 0:
            data = damage(data, rng)
        elif kind == 1:
            data = mutations.edit_safetensors(data, lambda header: mutations.edit_json(header, rng))
        else:
            data = mutations.edit_safetensors(data, lambda header: _resealed(header, rng))
    path.write_bytes(data)

    def read() -> bool:
        packed = cbp_jax.load_packed(path)
        return packed == saved or bool(kind > 1 and all(map(_fits, packed.tensors.values())))

    return read


def _resealed(header: dict[str, Any], rng: Rng) -> dict[str, Any]:
    """Changes the description of the tensors in a packed file, and renews its check sum."""
    about = header["__metadata__"]
    about["tensors"] = json.dumps(mutations.edit_json(json.loads(about["tensors"]), rng))
    about["tensors_crc32"] = f"{zlib.crc32(about['tensors'].encode()):08x}"
    return mutations.edit_json(header, rng) if rng.random() < 0.2 else header


def _fits(tensor: Any) -> bool:
    """Whether a packed tensor has a level for each code, and a scale for each weight."""
    if not isinstance(tensor, cbp_jax.PackedTensor):
        return isinstance(tensor, np.ndarray)
    levels, bits = tensor.constraint.levels, tensor.constraint.bits
    string = np.unpackbits(tensor.codes, bitorder="little")[: tensor.size * bits]
    codes = string.reshape(tensor.size, bits).astype(int) @ (1 << np.arange(bits))
    weights = np.asarray(levels)[codes].reshape(tensor.shape) * tensor.scale
    return weights.shape == tuple(tensor.shape)


# Weights.


@functools.cache
def _network() -> tuple[models.Network, dict[str, np.ndarray]]:
    model = nnx.eval_shape(lambda: models.SmallConvNet(3, 2, rngs=nnx.Rngs(0)))
    trees = jax.tree.map(
        lambda leaf: np.ones(leaf.shape, leaf.dtype), models.split_model(model)[1:]
    )
    return model, torch_weights.to_torch(model, *trees)


@functools.cache
def _safetensors() -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(_network()[1])


@functools.cache
def _pickles() -> tuple[bytes, bytes]:
    """In the form of an archive, and in the older one."""
    import torch

    tensors = {name: torch.from_numpy(array) for name, array in _network()[1].items()}
    files = io.BytesIO(), io.BytesIO()
    torch.save(tensors, files[0])
    torch.save(tensors, files[1], _use_new_zipfile_serialization=False)
    return files[0].getvalue(), files[1].getvalue()


def safetensors_case(rng: Rng, folder: Path) -> Read:
    """Tries `.safetensors` weights."""
    data = _safetensors()
    if rng.random() > _UNCHANGED:
        if rng.random() < 0.4:
            data = damage(data, rng)
        else:
            data = mutations.edit_safetensors(data, lambda header: mutations.edit_json(header, rng))
    return _weights_case(folder / "w.safetensors", data)


def pickle_case(rng: Rng, folder: Path) -> Read:
    """Tries `.pth` weights, in both of torch's forms."""
    archive, old = _pickles()
    data, edit = (archive, mutations.edit_archive) if rng.random() < 0.6 else (old, damage)
    if rng.random() > _UNCHANGED:
        if edit is damage and rng.random() < 0.5:
            edit = mutations.edit_pickle
        data = damage(data, rng) if rng.random() < 0.2 else edit(data, rng)
    return _weights_case(folder / "w.pth", data)


def _weights_case(path: Path, data: bytes) -> Read:
    path.write_bytes(data)
    model = _network()[0]
    expected = tuple(models.split_model(model)[1:])

    def read() -> bool:
        found = torch_weights.load_torch(path, model)
        same = jax.tree.map(
            lambda a, b: a.shape == b.shape and a.dtype == b.dtype and bool(np.isfinite(a).all()),
            found,
            expected,
        )
        return all(jax.tree.leaves(same))

    return read


# Photos.


@functools.cache
def _photos() -> tuple[bytes, ...]:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    photo = Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC)
    deep = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20)
    files = []
    for image, image_format, options in (
        (photo, "JPEG", {}),
        (photo, "JPEG", {"progressive": True}),
        (photo.convert("L"), "JPEG", {}),
        (photo.convert("CMYK"), "JPEG", {}),
        (photo, "PNG", {}),
        (photo.convert("P"), "PNG", {}),
        (photo.convert("LA"), "PNG", {}),
        (deep, "PNG", {}),
    ):
        file = io.BytesIO()
        image.save(file, image_format, **options)
        files.append(file.getvalue())
    return tuple(files)


def photo_case(rng: Rng, folder: Path) -> Read:
    """Tries a photo, read for training or for evaluation."""
    del folder
    data = _photos()[rng.integers(len(_photos()))]
    edit = mutations.edit_png if data.startswith(b"\x89PNG") else mutations.edit_jpeg
    if rng.random() > _UNCHANGED:
        data = (damage if rng.random() < 0.5 else edit)(data, rng)
    evaluates = rng.random() < 0.5

    def read() -> bool:
        pixels = decode_eval(data, 40, 32) if evaluates else decode_train(data, rng, 32)
        return pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8

    return read


# What a run leaves in its workdir.


def _changed_text(text: str, rng: Rng) -> bytes:
    """Changes JSON in its structure or in its bytes."""
    if rng.random() < _UNCHANGED:
        return text.encode()
    if rng.random() < 0.5:
        return damage(text.encode(), rng)
    return json.dumps(mutations.edit_json(json.loads(text), rng)).encode()


@functools.cache
def _config() -> str:
    config = base_config("fashion_mnist", "small_mlp")
    config.update({"learning_rate": 0.1, "data": "fashion_mnist", "normalization": "cifar10"})
    return config.to_json_best_effort(indent=2)


def config_case(rng: Rng, folder: Path) -> Read:
    """Tries a run's `config.json`."""
    (folder / "checkpoints").mkdir()
    (folder / "config.json").write_bytes(_changed_text(_config(), rng))

    def read() -> bool:
        config, base = read_config(folder, {}), base_config("", "")
        return all(
            isinstance(config[name], (int, float) if isinstance(value, float) else type(value))
            for name, value in base.items()
            if isinstance(value, str | int | float)
        )

    return read


_SUMMARY = Summary(
    "digits", "ternary", "cbp", 0, 0.98, 0.96, 1.0, 0.001, 0.002, 2, 1234, 9876, 12.5,
    bytes_file=1300, eval_loss=0.1, multipliers={"hidden1/kernel": 0.2, "hidden2/kernel": 0.1},
)  # fmt: skip
_FLOATS = ("full_precision_top1", "top1", "top5", "cfs", "cfs_relative", "seconds")


def summary_text() -> str:
    """A `summary.json`."""
    return json.dumps(dataclasses.asdict(_SUMMARY), indent=2)


def summary_case(rng: Rng, folder: Path) -> Read:
    """Tries a `summary.json`."""
    (folder / "summary.json").write_bytes(_changed_text(summary_text(), rng))

    def read() -> bool:
        found, saved = Summary.read(folder), dataclasses.asdict(_SUMMARY)
        layers = found.multipliers or {}
        of_floats = [*layers.values(), *(getattr(found, name) for name in _FLOATS)]
        return all(type(value) in (int, float) for value in of_floats) and all(
            type(getattr(found, name)) is type(value)
            for name, value in saved.items()
            if isinstance(value, str | int) and name != "bytes_file"  # which may be None
        )

    return read


def metrics_case(rng: Rng, folder: Path) -> Read:
    """Tries a `metrics.jsonl`; lines that are whole must be read."""
    rows = [
        {"epoch": n, "step": 5 * n, "loss": 1 / n, "violation": {"a": 0.5}} for n in range(1, 9)
    ]
    lines = [json.dumps(row) + "\n" for row in rows]
    kind = rng.random()
    if kind > 0.5 + _UNCHANGED / 2:
        data = damage("".join(lines).encode(), rng)
    else:
        if kind > _UNCHANGED / 2:
            line = rng.integers(len(lines))
            lines[line] = json.dumps(mutations.edit_json(rows[line], rng)) + "\n"
        data = "".join(lines).encode()
    (folder / "metrics.jsonl").write_bytes(data)

    def read() -> bool:
        found = read_metrics(folder)
        whole = [row for row in rows if f"\n{json.dumps(row)}\n".encode() in b"\n" + data]
        well_formed = all(isinstance(row, dict) and type(row["step"]) is int for row in found)
        return well_formed and all(row in found for row in whole)

    return read


# Checkpoints.

_STEPS = 1, 2


def _tree(step: int) -> dict[str, Any]:
    params = {"kernel": jnp.linspace(-1, 1, 24).reshape(4, 6) + step, "bias": jnp.full(3, step / 7)}
    return {"params": params, "opt_state": cbp_jax.ste("ternary").init(params)}


@functools.cache
def _checkpoints() -> tuple[tempfile.TemporaryDirectory[str], Mapping[int, dict[str, Any]]]:
    folder = tempfile.TemporaryDirectory()  # removed when the process ends
    trees = {step: _tree(step) for step in _STEPS}
    writer = Checkpoints(Path(folder.name), keep=len(_STEPS))
    for step, tree in trees.items():
        writer.save(step, {"tree": tree}, {"step": step})
    writer.close()
    return folder, trees


def checkpoint_case(rng: Rng, folder: Path) -> Read:
    """Tries a run's folder of two checkpoints, each of which must be read as it was saved."""
    original, trees = _checkpoints()
    shutil.copytree(original.name, folder, dirs_exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    newest = [path for path in files if path.is_relative_to(folder / str(max(_STEPS)))]
    for _ in range(rng.integers(1, 4) if rng.random() > _UNCHANGED else 0):
        some = newest if rng.random() < 0.8 else files
        _damage_file(some[rng.integers(len(some))], files[rng.integers(len(files))], rng)

    def read() -> bool:
        with contextlib.closing(Checkpoints(folder)) as reader:
            found = reader.restore_newest({"tree": trees[1]})
        if found is None:
            return False
        step, restored, run = found
        pairs = zip(*map(jax.tree.leaves, (restored["tree"], trees[step])), strict=True)
        return run == {"step": step} and all(np.array_equal(a, b) for a, b in pairs)

    return read


def _damage_file(path: Path, other: Path, rng: Rng) -> None:
    """Damages, removes or replaces a file, or swaps it with another."""
    if not path.is_file() or not other.is_file():  # so from an earlier change
        return
    match rng.integers(6):
        case 0:
            path.unlink()
        case 1:
            content = path.read_bytes()
            path.write_bytes(other.read_bytes())
            other.write_bytes(content)
        case 2:
            path.unlink()
            path.mkdir()
        case _:
            path.write_bytes(damage(path.read_bytes(), rng))
