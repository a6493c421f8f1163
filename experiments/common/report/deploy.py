"""A finished run as a file, packed or ONNX, and the accuracy that is read back from it."""

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
      batch_stats: travel along unchanged.
      opt_state: of the optimizer that constrained them.
      round: as `cbp_jax.pack` takes it.

    Returns:
      What was written; printed, a table.

    Raises:
      ValueError: if weights are off their levels, and not to be rounded.
    """
    packed = cbp_jax.pack({**params, _STATISTICS: batch_stats}, opt_state, round=round)
    cbp_jax.save_packed(path, packed)
    return packed


def load(path: Path, params: PyTree, batch_stats: PyTree) -> tuple[PyTree, PyTree]:
    """The quantized weights and the batch statistics of a file that `save` wrote.

    Args:
      path: of the file.
      params: gives structure and shapes.
      batch_stats: likewise.

    Raises:
      cbp_jax.PackedError: if the file is damaged, or of another network.
    """
    tree = cbp_jax.unpack(cbp_jax.load_packed(path), {**params, _STATISTICS: batch_stats})
    batch_stats = tree.pop(_STATISTICS)
    return tree, batch_stats


def rounding_line(packed: cbp_jax.Packed) -> str:
    """How many weights were put on their levels, and how far."""
    moved, furthest = (
        sum(layer.moved for layer in packed.rounding),
        max(layer.furthest for layer in packed.rounding),
    )
    weights = sum(
        tensor.size
        for tensor in packed.tensors.values()
        if isinstance(tensor, cbp_jax.PackedTensor)
    )
    share = f"{moved:,} of {weights:,} weights moved more than 1% of the scale to their levels"
    return f"{share}, the furthest {furthest:.1%}"


def onnx_accuracy(path: Path, batches: Iterable[Batch], preprocess: Preprocess) -> dict[str, float]:
    """Accuracy of an ONNX file in ONNX Runtime: "top1" and "top5" as shares of 1, "images".

    Products are computed in float32, as JAX computes them.

    Args:
      path: of the file.
      batches: as `train.make_evaluate` takes them; images whose label is negative do not count.
      preprocess: the network's images from a batch.
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
        hits = (
            np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]
        )  # negative labels never hit
        top1, top5, images = (
            top1 + int(hits[:, 0].sum()),
            top5 + int(hits.sum()),
            images + int(np.sum(labels >= 0)),
        )
    return {"top1": top1 / max(images, 1), "top5": top5 / max(images, 1), "images": float(images)}
