"""Saves a finished run as a packed file, and measures the accuracy of packed and ONNX files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import cbp_jax
from common.input.batch import Batch, Preprocess

PyTree = Any
PACKED_FILE = "weights.safetensors"
ONNX_FILE = "model.onnx"
_STATISTICS = "batch_stats"


def save(
    path: Path, params: PyTree, batch_stats: PyTree, opt_state: PyTree, round: bool = False
) -> cbp_jax.Packed:
    """Packs a network's weights and batch statistics into a file.

    Args:
      path: of the file.
      params: latent weights, a dictionary.
      batch_stats: stored unchanged.
      opt_state: of the optimizer that constrained the weights.
      round: as for `cbp_jax.pack`.

    Returns:
      What was written; it prints as a table.

    Raises:
      ValueError: if weights are off their levels and `round` is False.
    """
    packed = cbp_jax.pack({**params, _STATISTICS: batch_stats}, opt_state, round=round)
    cbp_jax.save_packed(path, packed)
    return packed


def load(path: Path, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """Reads quantized weights and batch statistics from a file that `save` wrote.

    Args:
      path: of the file.
      params: structure and shapes to expect.
      batch_stats: likewise.

    Raises:
      cbp_jax.PackedError: if the file is damaged, or of another network.
    """
    tree = cbp_jax.unpack(cbp_jax.load_packed(path), {**params, _STATISTICS: batch_stats})
    return tree, tree.pop(_STATISTICS)


def rounding_line(packed: cbp_jax.Packed) -> str:
    """Describes how many weights were snapped to their levels, and from how far."""
    moved = sum(layer.moved for layer in packed.rounding)
    furthest = max(layer.furthest for layer in packed.rounding)
    tensors = packed.tensors.values()
    weights = sum(tensor.size for tensor in tensors if isinstance(tensor, cbp_jax.PackedTensor))
    share = f"{moved:,} of {weights:,} weights moved more than 1% of the scale to their levels"
    return f"{share}, the furthest {furthest:.1%}"


def onnx_accuracy(path: Path, batches: Iterable[Batch], preprocess: Preprocess) -> dict[str, float]:
    """Measures the accuracy of an ONNX file in ONNX Runtime.

    Products are computed in float32, as in JAX.

    Args:
      path: of the file.
      batches: as for `make_evaluate`; images whose label is negative do not count.
      preprocess: maps a batch to the network's images.

    Returns:
      "top1" and "top5" as fractions, and the number of "images".
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    prepare = jax.jit(preprocess)
    top1 = top5 = images = 0
    for batch in batches:
        labels = np.asarray(batch["label"])
        inputs = np.asarray(prepare(batch, jax.random.key(0)), np.float32)
        (logits,) = session.run(None, {session.get_inputs()[0].name: inputs})
        best = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        hits = best == labels[:, None]  # negative labels never hit
        top1 += int(hits[:, 0].sum())
        top5 += int(hits.sum())
        images += int(np.sum(labels >= 0))
    return {"top1": top1 / max(images, 1), "top5": top5 / max(images, 1), "images": float(images)}
