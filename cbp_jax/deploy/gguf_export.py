"""Exports weights to GGUF, the file format of llama.cpp, constrained ones in a few bits."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cbp_jax.deploy.files import replacing
from cbp_jax.deploy.gguf_blocks import BLOCK_TYPES, Q1_0, pack_rows, unpack_q1_0
from cbp_jax.deploy.gguf_metadata import (
    ARCHITECTURE,
    Typed,
    add_metadata,
    check_metadata,
    typed_metadata,
)
from cbp_jax.deploy.gguf_tensors import FLOATS, Q8_0, ByPath, FileTensor, plan_tensors
from cbp_jax.deploy.onnx_weights import level_integers
from cbp_jax.masking import PyTree

# Above what rounding explains, 2^-11 for float16 scales and twice 2^-8 for bfloat16 weights, and
# below what a wrong integer makes, an eighth.
_TOLERANCE = 2.0**-6


def export_gguf(
    path: str | os.PathLike[str],
    params: PyTree,
    opt_state: optax.OptState | None,
    *,
    names: ByPath,
    metadata: Mapping[str, Any],
    weight_type: str | ByPath | None = None,
    other_type: str = "F32",
    transpose: str | Sequence[str] | None = None,
) -> float:
    """Exports the weights, constrained ones on their levels, as a GGUF file for llama.cpp.

    A constrained weight is `integer * scale`, in blocks along a row, each with its scale as a
    float16 number. That is what `quantize` gives, to the bit, if the scale is such a number, of at
    least 2^-12: give the link `scale_fn=cbp_jax.float16_scale`.

        type     bits   rows of          levels, in any unit
        "Q1_0"   1.125  128 k weights    -1 and 1: `binary`
        "TQ2_0"  2.063  256 k weights    -1 to 1: `ternary`
        "TQ1_0"  1.688  256 k weights    -1 to 1; smaller than "TQ2_0", and slower
        "Q4_0"   4.5    32 k weights     -8 to 7: `one_bit_shift`, `two_bit_shift`

    A row holds the weights of one output. So the two axes of leaves named "kernel" or "w", which
    are (inputs, outputs) in Flax and Haiku, are swapped. Others are not: an embedding (tokens,
    features) and Equinox's weights have that order already. There may be one scale per tensor, per
    stacked layer, or per output, as with `scale_axis=-1` for a kernel.

    Args:
      path: the file to write.
      params: the latent weights. All leaves that are arrays are written.
      opt_state: any optimizer state with one or more links' states in it; None: nothing is
        constrained, and `other_type` is the type of all weights.
      names: the tensor's name for each leaf's path, whose keys are joined by "/": a mapping, or a
        function. A name with "{}" in it is that of one tensor per layer, for leaves whose first
        axis is that of the layers, as `nnx.scan` stacks them: "blk.{}.attn_q.weight".
      metadata: values by GGUF key: "general.architecture", and what llama.cpp needs for it and for
        the tokenizer. Values are bools, integers (uint32; int32 in lists), floats (float32), text,
        bytes, or lists of one kind of them.
      weight_type: the type of constrained leaves. None takes "Q1_0", "TQ2_0" or "Q4_0", the first
        that holds the levels; "F16" and "F32" hold any. A mapping or a function from paths gives
        each leaf its own, or None.
      other_type: the type of unconstrained leaves, "F32", "F16", or "Q8_0", which rounds them to 8
        bits in rows of 32 k weights. Tensors of one axis are always F32, as llama.cpp wants them.
      transpose: patterns, as in `select`, of the leaves whose last two axes are swapped; None
        matches those named "kernel" or "w".

    Returns:
      How far the weights, read back from the file, are from `quantize(params, opt_state)`: the
      largest difference relative to the largest absolute value of the row, or of the tensor if it
      is unconstrained. It is 0 if all are equal, about 5e-4 at most if float16 rounds scales, and
      4e-3 if "Q8_0" rounds weights.

    Raises:
      ImportError: if gguf is not installed.
      ValueError: as `quantize` does; if leaves have no name, or two the same, or a name is longer
        than 63 bytes; if the type of a leaf does not hold its levels, its rows or the scales along
        them; if weights are not finite, or float16 cannot hold them or their scales; if the
        architecture is missing. It names the leaf, and an existing file is unchanged.
      TypeError: as `quantize` does; or if a leaf is not made of floating-point numbers.

    Example:
      >>> import jax.numpy as jnp, cbp_jax
      >>> params = {"up": {"kernel": jnp.linspace(-1, 1, 512).reshape(256, 2)}}
      >>> link = cbp_jax.cbp(constraint="ternary", scale_fn=cbp_jax.float16_scale)
      >>> cbp_jax.export_gguf(  # doctest: +SKIP
      ...     "model.gguf", params, link.init(params),
      ...     names={"up/kernel": "blk.0.ffn_up.weight"},
      ...     metadata={"general.architecture": "llama"},
      ... )
      0.0

    Reference: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    gguf = _import_gguf()
    tensors = list(plan_tensors(params, opt_state, names, weight_type, other_type, transpose))
    typed = typed_metadata(metadata)
    with replacing(FilePath(path)) as new:
        _write(gguf, new, tensors, typed)
        return _compare(gguf, new, tensors, typed)


def _import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError('export_gguf needs gguf: pip install "cbp_jax[gguf]"') from error
    return gguf


def _write(
    gguf: ModuleType, path: FilePath, tensors: Sequence[FileTensor], metadata: Mapping[str, Typed]
) -> None:
    writer = gguf.GGUFWriter(path, metadata[ARCHITECTURE].value)
    add_metadata(writer, metadata)
    for tensor in tensors:
        kind = gguf.GGMLQuantizationType[tensor.kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.float32, tensor.nbytes, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_stored(gguf, tensor))
    finally:
        writer.close()


def _stored(gguf: ModuleType, tensor: FileTensor) -> np.ndarray:
    """A tensor as the file holds it: floats, or the bytes of its rows."""
    if tensor.kind in FLOATS:
        with np.errstate(over="ignore"):  # which _compare finds
            return np.ascontiguousarray(_wanted(tensor).astype(FLOATS[tensor.kind]))
    if tensor.kind == Q8_0:
        with np.errstate(over="ignore", invalid="ignore"):  # which _compare finds
            return gguf.quants.quantize(_wanted(tensor), gguf.GGMLQuantizationType.Q8_0)
    assert tensor.constraint is not None
    kind, found = BLOCK_TYPES[tensor.kind], level_integers(tensor.constraint)
    assert found is not None  # or the plan would not have chosen the type
    unit, integers = found
    code_of_level = np.searchsorted(kind.integers, integers).astype(np.uint8)
    index = np.asarray(tensor.constraint.level_index(tensor.rows, tensor.row_scale))
    # Weights of 16 bits are multiples of a scale that is rounded to 16 bits as well.
    dtype = jax.dtypes.canonicalize_dtype(tensor.weight.dtype)
    scale = np.asarray((tensor.row_scale * unit).astype(dtype))
    return pack_rows(kind, code_of_level[index], scale)


def _wanted(tensor: FileTensor) -> np.ndarray:
    """The weights as `quantize` gives them, in the order of the file's axes."""
    weights = tensor.rows
    if tensor.constraint is not None:
        weights = tensor.constraint.quantize(weights, tensor.row_scale)
    return np.asarray(weights, jnp.promote_types(weights.dtype, jnp.float32))


def _compare(
    gguf: ModuleType, path: FilePath, tensors: Sequence[FileTensor], metadata: Mapping[str, Typed]
) -> float:
    """Reads the file and returns the largest relative difference.

    Raises:
      ValueError: if rounding does not explain it; or weights are not finite.
    """
    reader = gguf.GGUFReader(path)
    check_metadata(reader, metadata)
    largest = 0.0
    for tensor, read in zip(tensors, reader.tensors, strict=True):
        wanted = _wanted(tensor)
        if not np.all(np.isfinite(wanted)):
            raise ValueError(f"{tensor.path!r} has weights or scales that are NaN or infinite")
        found = (read.name, read.tensor_type.name, tuple(map(int, reversed(read.shape))))
        if found != (tensor.name, tensor.kind, tensor.shape):
            raise ValueError(f"{tensor.path!r} reads back as another tensor: {found}")
        weights = _dequantize(gguf, read)
        # Rows of constrained weights may differ much in their scales.
        difference = _relative_difference(
            weights.reshape(wanted.shape), wanted, -1 if tensor.constraint is not None else None
        )
        if not difference <= _TOLERANCE:
            raise ValueError(
                f"{tensor.path!r} as {tensor.kind} would differ by {difference:.2g} of its largest "
                "weight. float16, the type of 'F16' and of the scales of blocks, holds 6e-5 to "
                "65504, and less below: rescale the layer, or give it the type 'F32'"
            )
        largest = max(largest, difference)
    return largest


def _dequantize(gguf: ModuleType, tensor: Any) -> np.ndarray:
    if tensor.tensor_type.name == Q1_0.name:  # gguf 0.19 does not read it
        return unpack_q1_0(np.asarray(tensor.data))
    with np.errstate(invalid="ignore"):  # an infinite scale
        return gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)


def _relative_difference(got: np.ndarray, wanted: np.ndarray, axis: int | None) -> float:
    """The largest difference, relative to the largest value along an axis."""
    if wanted.ndim == 0:
        axis = None
    with np.errstate(invalid="ignore", divide="ignore"):
        difference = np.max(np.abs(got - wanted), axis=axis)
        relative = difference / np.max(np.abs(wanted), axis=axis)
    return float(np.max(np.where(difference == 0, 0, relative)))
