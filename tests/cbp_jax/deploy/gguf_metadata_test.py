"""Metadata of GGUF files: read back as it was given, or refused."""

import numpy as np
import pytest
from gguf_support import LLAMA, export_kernel, gguf, normal


def test_metadata(tmp_path):
    metadata = LLAMA | {
        "llama.block_count": 2, "negative": -1, "large": 2**32, "lowest": -(2**40),
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "yes": True, "empty": "", "é": "ü",
        "tokenizer.ggml.tokens": ["<s>", b"\xff"], "tokenizer.ggml.scores": (0.1, -1.0),
        "tokenizer.ggml.token_type": [gguf.TokenType.BYTE, 1], "flags": [True, False],
        "numpy": np.arange(3), "number": np.float64(0.5), "unsigned": [2**31],
    }  # fmt: skip
    export_kernel(tmp_path / "m", normal(256, 2), metadata=metadata)
    fields = gguf.GGUFReader(tmp_path / "m").fields
    types = {
        key: ",".join(kind.name for kind in field.types)
        for key, field in fields.items()
        if not key.startswith("GGUF.")
    }
    assert types == {
        "general.architecture": "STRING", "general.quantization_version": "UINT32",
        "llama.block_count": "UINT32", "negative": "INT32", "large": "UINT64", "lowest": "INT64",
        "llama.attention.layer_norm_rms_epsilon": "FLOAT32", "yes": "BOOL", "empty": "STRING",
        "é": "STRING", "tokenizer.ggml.tokens": "ARRAY,STRING",
        "tokenizer.ggml.scores": "ARRAY,FLOAT32", "tokenizer.ggml.token_type": "ARRAY,INT32",
        "flags": "ARRAY,BOOL", "numpy": "ARRAY,INT32", "number": "FLOAT32",
        "unsigned": "ARRAY,UINT32",
    }  # fmt: skip
    tokens = fields["tokenizer.ggml.tokens"]
    assert [tokens.parts[i].tobytes() for i in tokens.data] == [b"<s>", b"\xff"]
    simple = ("llama.block_count", "negative", "large", "lowest", "yes", "empty", "é", "flags")
    assert {key: fields[key].contents() for key in simple} == {key: metadata[key] for key in simple}
    assert fields["tokenizer.ggml.scores"].contents() == [np.float32(0.1), -1.0]
    assert fields["tokenizer.ggml.token_type"].contents() == [6, 1]
    assert fields["general.quantization_version"].contents() == gguf.GGML_QUANT_VERSION


def test_metadata_that_read_back_differently(tmp_path, monkeypatch):
    add = gguf.GGUFWriter.add_key_value

    def add_one(writer, key, value, *types):
        add(writer, key, value + 1 if key == "n" else value, *types)

    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", add_one)
    with pytest.raises(ValueError, match="metadata: 'n' reads back as"):
        export_kernel(tmp_path / "m", normal(256, 2), metadata=LLAMA | {"n": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"general.architecture": ""}, "metadata needs 'general.architecture'"),
        ({"a": []}, "the value of 'a' must be .* not empty"),
        ({"a": [1, 2.0]}, "the value of 'a' must be .* one kind"),
        ({"a": None}, "the value of 'a' must be"),
        ({"a": 2**64}, "the value of 'a' must be .* 64 bits"),
        ({"a": 1e39}, "the value of 'a' must be .* float32"),
        ({"a": float("nan")}, "the value of 'a' must be .* finite"),
        ({"a": [[1]]}, "the value of 'a' must be"),
        ({3: 1}, "3 is no key"),
        ({"general.alignment": 64}, "'general.alignment' is not yours to choose"),
    ],
)
def test_wrong_metadata(added, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_kernel(tmp_path / "m", normal(256, 2), metadata=LLAMA | added)
    with pytest.raises(ValueError, match=r"metadata needs 'general\.architecture'.*got None"):
        export_kernel(tmp_path / "m", normal(256, 2), metadata={})
