"""Runs GGUF files of networks on bytes in llama.cpp, by the package xllamacpp, on the CPU."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from common.input.text import BYTES

# A letter of ASCII. llama.cpp keeps the probabilities back while a character lacks bytes.
_LETTER = ord(" ")
_SURE = 1000.0  # a bias to draw it, which the probabilities asked for do not have


class Speed(NamedTuple):
    """Tokens per second."""

    prompt: float  # read at once
    generation: float  # one after another


class LlamaCpp:
    """A file, loaded; a context manager, which releases it.

    Keys and values are float32 and attention is not fused, as in JAX, so that an F32 file gives
    JAX's probabilities. Low-bit files round activations to 8 bits.

    Args:
      path: of the file.
      threads: to compute with.

    Raises:
      ImportError: if xllamacpp is not installed.
      ValueError: if llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, threads: int = 1):
        try:
            import xllamacpp
        except ImportError as error:
            raise ImportError('llama.cpp needs xllamacpp: pip install "cbp_jax[llama]"') from error
        # The server listens; a socket in a folder of its own is no port that others could reach.
        self._folder = tempfile.TemporaryDirectory(prefix="llama_cpp")
        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.hostnames = [f"{self._folder.name}/server.sock"]
        options.ui = options.warmup = options.fit_params = False
        options.verbosity = -1  # silent
        options.n_parallel = 1
        options.n_ctx = 0  # as the file says
        options.n_gpu_layers = 0
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(options)
        except RuntimeError as error:
            self._folder.cleanup()
            raise ValueError(
                f"llama.cpp cannot load {path}: is it a GGUF file, of types that xllamacpp "
                f"{xllamacpp.__version__} knows?"
            ) from error

    def close(self) -> None:
        """Ends the server, and frees the weights."""
        self._server = None
        self._folder.cleanup()

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def complete(self, prompt: str | Sequence[int], count: int, **options: Any) -> dict[str, Any]:
        """Returns llama.cpp's answer: the likeliest `count` tokens after a prompt.

        Args:
          prompt: text, or tokens.
          count: how many tokens, fewer if the context is full.
          options: of llama.cpp's server.

        Raises:
          ValueError: if the prompt is empty, or fills the context.
        """
        request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
        answer = self._server.handle_completions({**request, **options})
        if "error" in answer:
            raise ValueError(f"llama.cpp: {answer['error']['message']}")
        return answer

    def log_probabilities(self, tokens: Sequence[int]) -> np.ndarray:
        """Returns those of each byte after each token and those before it, (tokens, 256), float32.

        Args:
          tokens: fewer than the context has, since llama.cpp wants room for the next.
        """
        found = np.full((len(tokens), BYTES), np.nan, np.float32)
        for i, row in enumerate(found):
            # llama.cpp has computed the earlier tokens, and keeps them.
            answer = self.complete(
                [int(token) for token in tokens[: i + 1]],
                1,
                n_probs=BYTES,
                cache_prompt=True,
                post_sampling_probs=False,  # before temperature, bias and the like
                logit_bias=[[_LETTER, _SURE]],
            )
            (drawn,) = answer["choices"][0]["logprobs"]["content"]
            for likely in drawn["top_logprobs"]:
                row[likely["id"]] = likely["logprob"]
        return found

    def generate(self, prompt: str, count: int) -> str:
        """Returns the prompt and what follows it, always the likeliest byte."""
        return prompt + self.complete(prompt, count)["choices"][0]["text"]

    def speed(self, prompt: Sequence[int], count: int) -> Speed:
        """Measures reading a prompt anew, then generating `count` tokens, by llama.cpp's clock."""
        answer = self.complete([int(token) for token in prompt], count, cache_prompt=False)
        timings = answer["timings"]
        return Speed(timings["prompt_per_second"], timings["predicted_per_second"])
