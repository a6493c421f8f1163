"""A small Llama with random weights, and its GGUF files."""

import jax
import ml_collections
import numpy as np
from common import models
from common.report.llama_gguf import export_llama
from flax import nnx

import cbp_jax

SIZES = {"width": 256, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 512, "context": 64}
CONFIG = ml_collections.FrozenConfigDict(
    {"experiment": "random", "network": "llama", "num_classes": 256, **SIZES}
)


def random_llama(seed=0):
    """A network, its parameters, and an optimizer state by constraint; logits are uneven."""
    model = models.create("llama", rngs=nnx.Rngs(0), **SIZES)
    graphdef, params, batch_stats = models.split_model(model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(
        lambda w: (0.08 if w.ndim > 1 else 1.0) * rng.normal(size=w.shape).astype(np.float32),
        params,
    )

    def state(constraint):
        link = cbp_jax.ste(
            constraint,
            mask=cbp_jax.select(include=model.constrained),
            scale_fn=cbp_jax.float16_scale,
        )
        return link.init(params)

    return lambda weights: nnx.merge(graphdef, weights, batch_stats), params, state


def log_probabilities(model, tokens):
    """JAX's, (tokens, classes), after each token."""
    return np.asarray(jax.nn.log_softmax(model(np.asarray(tokens, np.int32)[None])[0]))


def write(path, params, opt_state=None, weight_type=None, other_type="F32"):
    """Writes the file; returns its path."""
    export_llama(path, CONFIG, params, opt_state, weight_type, other_type)
    return path
