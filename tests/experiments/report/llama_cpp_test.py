"""GGUF files in llama.cpp give JAX's log-probabilities, from tokens that are bytes."""

import sys

import jax.numpy as jnp
import numpy as np
import pages
import pytest
from common.report.llama_cpp import LlamaCpp
from llama_support import SIZES, log_probabilities, random_llama, write

import cbp_jax

pytest.importorskip("gguf", reason='needs the extra: pip install -e ".[test]"')
pytest.importorskip("xllamacpp", reason='needs the extra: pip install -e ".[test]"')

TOKENS = np.random.default_rng(2).integers(0, 256, SIZES["context"] - 1).tolist()


@pytest.fixture(scope="module")
def network():
    return random_llama()


@pytest.fixture(scope="module")
def loaded(network, tmp_path_factory):
    """The network in full precision."""
    path = write(tmp_path_factory.mktemp("llama") / "m.gguf", network[1])
    with LlamaCpp(path) as loaded:
        yield loaded


def from_halves(kernel, heads):
    """Puts neighbouring channels half a head apart, where networks have them that rotate halves."""
    pairs = np.asarray(kernel).reshape(len(kernel), heads, -1, 2)
    return jnp.asarray(pairs.swapaxes(2, 3).reshape(kernel.shape))


def test_log_probabilities_are_jaxs(network, loaded):
    merge, params, _ = network
    found = loaded.log_probabilities(TOKENS)
    assert found.shape == (len(TOKENS), 256)
    np.testing.assert_allclose(np.exp(np.float64(found)).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found, log_probabilities(merge(params), TOKENS), rtol=0, atol=1e-3)


def test_an_earlier_question_changes_nothing(loaded):
    """Nor what llama.cpp kept of it, nor the settings of sampling."""
    expected = loaded.log_probabilities(TOKENS[:9])
    loaded.generate("something else", 20)
    loaded.complete([*TOKENS[:5], 1, 2, 3], 10, temperature=3.0)
    np.testing.assert_allclose(loaded.log_probabilities(TOKENS[:9]), expected, rtol=0, atol=1e-4)


def test_channels_in_the_order_of_halves_would_be_found(network, tmp_path):
    """Rotated in the wrong pairs, after the first token, log-probabilities are far off."""
    merge, params, _ = network
    blocks = {
        number: {
            **block,
            "attention": {
                **block["attention"],
                "q": {"kernel": from_halves(block["attention"]["q"]["kernel"], SIZES["heads"])},
                "k": {"kernel": from_halves(block["attention"]["k"]["kernel"], SIZES["kv_heads"])},
            },
        }
        for number, block in params["blocks"].items()
    }
    with LlamaCpp(write(tmp_path / "m.gguf", {**params, "blocks": blocks})) as wrong:
        found = wrong.log_probabilities(TOKENS)
    difference = np.abs(found - log_probabilities(merge(params), TOKENS)).max(axis=1)
    assert difference[0] < 1e-3  # a single token is not turned
    assert difference[1:].max() > 0.1


@pytest.mark.parametrize(
    ("constraint", "kind"),
    [("ternary", "TQ2_0"), ("ternary", "TQ1_0"), ("binary", "Q1_0"), ("two_bit_shift", "Q4_0")],
)
def test_low_bit_files(constraint, kind, network, tmp_path):
    """The F32 file of the same levels is JAX's; the low-bit one differs by its activations."""
    merge, params, state = network
    opt_state = state(constraint)
    expected = log_probabilities(merge(cbp_jax.quantize(params, opt_state)), TOKENS)
    with LlamaCpp(write(tmp_path / "f32.gguf", params, opt_state, "F32")) as exact:
        np.testing.assert_allclose(exact.log_probabilities(TOKENS), expected, rtol=0, atol=1e-3)
    with LlamaCpp(write(tmp_path / "low.gguf", params, opt_state, kind)) as low:
        found = low.log_probabilities(TOKENS)
        assert low.complete("To be", 20)["usage"]["completion_tokens"] == 20
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    assert 1e-4 < np.abs(found - expected).max() < 1


TEXTS = {
    "spaces and lines": "  two spaces before,\n\n\tafter  \r\n ",
    "not ASCII": "naïve Ω 漢字 🎭 \u2581 Ġ À ÿ",
    "words of other tokenizers": "<s> </s> <unk> <0x41> <0xFF> [INST]",
    "control characters": "\x01\x02\x03\x7f",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_tokens_are_bytes(text, loaded):
    """llama.cpp finds what it knows of a text in the same tokens, given as numbers."""
    tokens = list(text.encode())
    answer = loaded.complete(text, 1, cache_prompt=True)
    assert answer["usage"]["prompt_tokens"] == len(tokens)
    again = loaded.complete(tokens, 1, cache_prompt=True)
    assert again["timings"]["cache_n"] == len(tokens) - 1
    other = loaded.complete([*tokens[:-2], 0, tokens[-1]], 1, cache_prompt=True)
    assert other["timings"]["cache_n"] == len(tokens) - 2


def test_the_end_of_a_text_is_the_byte_that_utf8_never_has(loaded):
    loaded.complete("a<|endoftext|>", 1, cache_prompt=True)
    assert loaded.complete([97, 255], 1, cache_prompt=True)["timings"]["cache_n"] == 1
    assert loaded.complete("a<|endoftext|>b", 1)["usage"]["prompt_tokens"] == 3


def test_text_is_the_likeliest(network, loaded):
    merge, params, _ = network
    tokens, model = np.zeros(24, np.int32), merge(params)
    tokens[:5] = list(b"To be")
    for i in range(5, 17):
        tokens[i] = log_probabilities(model, tokens)[i - 1].argmax()
    expected = bytes(tokens[:17].tolist()).decode(errors="replace")
    assert loaded.generate("To be", 12) == expected


def test_speed(loaded, monkeypatch):
    """Of the whole prompt, read anew although llama.cpp knows it, and of all that is generated."""
    answers, complete = [], loaded.complete

    def record(*args, **options):
        answers.append(complete(*args, **options))
        return answers[-1]

    monkeypatch.setattr(loaded, "complete", record)
    for _ in range(2):
        speed = loaded.speed(TOKENS[:20], 12)
        timings = answers[-1]["timings"]
        assert (timings["prompt_n"], timings["predicted_n"]) == (20, 12)
        assert speed.prompt == pytest.approx(20_000 / timings["prompt_ms"])
        assert speed.generation > 0


def test_the_page(network, tmp_path, monkeypatch, capsys):
    _, params, state = network
    monkeypatch.chdir(tmp_path)
    write("model.gguf", params, state("ternary"))
    exec(pages.block("llama"), {})
    assert len(capsys.readouterr().out) > 1


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(ImportError, match=r'pip install "cbp_jax\[llama\]"'):
        LlamaCpp(tmp_path / "m")


def test_what_llama_cpp_refuses(loaded, tmp_path):
    with pytest.raises(ValueError, match="exceeds the available context size"):
        loaded.log_probabilities([*TOKENS, 1, 2])
    with pytest.raises(ValueError, match="must not be empty"):
        loaded.complete([], 1)
    (tmp_path / "m").write_text("no such file")
    for path in (tmp_path / "m", tmp_path / "n"):
        with pytest.raises(ValueError, match=f"llama.cpp cannot load {path}: is it a GGUF file"):
            LlamaCpp(path)
