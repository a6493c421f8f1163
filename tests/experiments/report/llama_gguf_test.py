"""The Llama's GGUF file: a name for every leaf, sizes, and tokens that are bytes."""

import jax
import ml_collections
import numpy as np
import pytest
from common.report import llama_gguf
from llama_support import CONFIG, SIZES, random_llama, write

gguf = pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[test]"')


def changed(**fields):
    return ml_collections.FrozenConfigDict({**CONFIG.to_dict(), **fields})


@pytest.fixture(scope="module")
def network():
    return random_llama()


def test_every_leaf_is_there(network, tmp_path):
    _, params, state = network
    reader = gguf.GGUFReader(write(tmp_path / "m", params, state("ternary")))
    outside = {"token_embd.weight": "F32", "output_norm.weight": "F32", "output.weight": "F32"}
    layers = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    inside = {
        f"blk.{block}.{layer}.weight": "TQ2_0" if layer in layers else "F32"
        for block in range(SIZES["depth"])
        for layer in (*layers, "attn_norm", "ffn_norm")
    }
    found = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert found == outside | inside
    assert len(found) == len(jax.tree.leaves(params))
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert shapes["blk.1.attn_k.weight"] == (256, 128)  # inputs first
    assert shapes["blk.0.ffn_down.weight"] == (512, 256)


@pytest.mark.parametrize("path", ["blocks/0/mlp/gate/bias", "blocks/0", "gate/kernel", "embed"])
def test_other_leaves_have_no_name(path):
    assert llama_gguf.tensor_name(path) is None


def test_sizes(network, tmp_path):
    _, params, _ = network
    fields = gguf.GGUFReader(write(tmp_path / "m", params)).fields
    found = {key: fields[f"llama.{key}"].contents() for key in (
        "context_length", "embedding_length", "block_count", "feed_forward_length",
        "attention.head_count", "attention.head_count_kv", "rope.dimension_count",
        "rope.freq_base", "vocab_size",
    )}  # fmt: skip
    assert list(found.values()) == [64, 256, 2, 512, 4, 2, 64, 10_000.0, 256]
    epsilon = fields["llama.attention.layer_norm_rms_epsilon"].contents()
    assert epsilon == np.float32(1e-5)
    assert llama_gguf.metadata(changed(kv_heads=0))["llama.attention.head_count_kv"] == 4


def test_letters_are_those_of_gpt2():
    """By its own description: bytes that print are themselves, a space is Ġ, a new line Ċ."""
    letters = llama_gguf.byte_letters()
    assert len(set(letters)) == 256
    assert [letters[byte] for byte in b"!~ \n\0"] == ["!", "~", "Ġ", "Ċ", "Ā"]
    assert (letters[0x7F], letters[0xA0], letters[0xAD]) == ("ġ", "ł", "Ń")
    assert (letters[0xC3], letters[0xFE]) == ("Ã", "þ")


def test_types_of_the_other_layers(network, tmp_path):
    _, params, state = network
    for opt_state, inside in ((None, "Q8_0"), (state("ternary"), "TQ2_0")):
        file = write(tmp_path / "m", params, opt_state, other_type="Q8_0")
        kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
        assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
        assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
        assert {kind for name, kind in kinds.items() if "ffn_down" in name} == {inside}


def test_other_networks_are_refused():
    with pytest.raises(
        ValueError, match=r"this one is resnet20: .*--format=packed or --format=onnx"
    ):
        llama_gguf.metadata(changed(network="resnet20"))
    with pytest.raises(ValueError, match="num_classes=256, the bytes; got 300"):
        llama_gguf.metadata(changed(num_classes=300))
