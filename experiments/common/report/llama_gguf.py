"""Writes the network `llama` as a GGUF file that llama.cpp runs.

Tokens are bytes, and the file's vocabulary has these 256 and no other, so that embedding, head and
probabilities are the network's own. It is a byte-level one, as GPT-2's, without merges: "llama",
the tokenizer of Llama 1 and 2, would spend three bytes on each space, and need tokens besides.
llama.cpp wants a token that ends a text. That is 255, a byte which UTF-8 never has, and which is
written `<|endoftext|>`.
"""

from pathlib import Path
from typing import Any

import ml_collections

import cbp_jax
from common.input.text import BYTES
from common.models.llama import NORM_EPSILON, ROTARY_BASE

PyTree = Any
GGUF_FILE = "model.gguf"
OTHER_TYPES = ("F32", "F16", "Q8_0")  # of weights that are not constrained

_END = BYTES - 1
_OUTSIDE = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "head/kernel": "output.weight",
}
_IN_BLOCKS = {
    "attention_norm/scale": "attn_norm.weight",
    "attention/q/kernel": "attn_q.weight",
    "attention/k/kernel": "attn_k.weight",
    "attention/v/kernel": "attn_v.weight",
    "attention/o/kernel": "attn_output.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "mlp/gate/kernel": "ffn_gate.weight",
    "mlp/up/kernel": "ffn_up.weight",
    "mlp/down/kernel": "ffn_down.weight",
}


def export_llama(
    path: Path,
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict,
    params: PyTree,
    opt_state: PyTree | None,
    weight_type: str | None = None,
    other_type: str = "F32",
) -> float:
    """Writes the file; returns how far its weights are off, as `cbp_jax.export_gguf` does.

    Args:
      path: of the file.
      config: of the run.
      params: latent weights.
      opt_state: of the optimizer that constrained them; None for a network in full precision.
      weight_type: of the constrained layers; None for what their levels need.
      other_type: of embedding and head, and of all layers in full precision; one of OTHER_TYPES.

    Raises:
      ImportError: if gguf is not installed.
      ValueError: if the network is another one, or a layer does not fit its type.
    """
    return cbp_jax.export_gguf(
        path,
        params,
        opt_state,
        names=tensor_name,
        metadata=metadata(config),
        weight_type=weight_type,
        other_type=other_type,
    )


def tensor_name(path: str) -> str | None:
    """Returns llama.cpp's name for a parameter of `Llama`; None if it has none."""
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    blocks, _, rest = path.partition("/")
    number, _, name = rest.partition("/")
    known = blocks == "blocks" and name in _IN_BLOCKS
    return f"blk.{number}.{_IN_BLOCKS[name]}" if known else None


def metadata(
    config: ml_collections.ConfigDict | ml_collections.FrozenConfigDict,
) -> dict[str, Any]:
    """Returns what llama.cpp needs to know of a network and its tokens.

    Raises:
      ValueError: if the network is no Llama on bytes.
    """
    if config.network != "llama":
        raise ValueError(
            f"GGUF is for the network llama, and this one is {config.network}: it can be written "
            "with --format=packed or --format=onnx"
        )
    if config.num_classes != BYTES:
        raise ValueError(f"GGUF needs num_classes={BYTES}, the bytes; got {config.num_classes}")
    sizes = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.depth,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads or config.heads,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "rope.dimension_count": config.width // config.heads,
        "rope.freq_base": ROTARY_BASE,
        "vocab_size": BYTES,
    }
    return {
        "general.architecture": "llama",
        "general.name": config.experiment,
        **{f"llama.{key}": value for key, value in sizes.items()},
        **_tokenizer(),
    }


def _tokenizer() -> dict[str, Any]:
    normal, control = 1, 3  # llama.cpp's types of tokens
    letters = byte_letters()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*letters[:_END], "<|endoftext|>"],
        "tokenizer.ggml.token_type": [normal] * _END + [control],
        # A list may not be empty: this merge of letters that stand for no byte never happens.
        "tokenizer.ggml.merges": ["\u0400 \u0400"],
        "tokenizer.ggml.bos_token_id": _END,
        "tokenizer.ggml.eos_token_id": _END,
        "tokenizer.ggml.add_bos_token": False,
    }


def byte_letters() -> list[str]:
    """Returns the letter that stands for each byte in GPT-2's vocabulary.

    Bytes that print in Latin-1 stand for themselves, the others, in order, for U+0100 and on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(BYTES) if byte not in printed]
    return [
        chr(byte) if byte in printed else chr(0x100 + others.index(byte)) for byte in range(BYTES)
    ]
