"""A Llama: a decoder of pre-normalised blocks, rotary positions, grouped heads and SwiGLU.

Embedding and head are apart, and stay in full precision. Nothing has a bias. Heads are rotated in
pairs of neighbouring channels, as Meta's weights and llama.cpp's `llama` have them (Hugging Face's
pair a channel with that half a head away: `neighbouring_pairs` reorders their kernels). Sizes are
those that files in GGUF name.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from common.models.layers import rms_norm

ROTARY_BASE = 10_000.0
NORM_EPSILON = 1e-5
_STD = 0.02  # of initial weights


class Attention(nnx.Module):
    """Causal attention; each of `kv_heads` keys and values serves as many heads as its neighbours.

    Args:
      width: channels of the input and of the output.
      heads: of the queries; `width // heads` channels each.
      kv_heads: of keys and values, a divisor of `heads`.
      output_std: of the last kernel's initial weights.
      dtype: of the computation.
      rngs: where the weights come from.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        output_std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.channels = width // heads
        shared = kv_heads * self.channels
        self.q = _linear(width, width, dtype=dtype, rngs=rngs)
        self.k = _linear(width, shared, dtype=dtype, rngs=rngs)
        self.v = _linear(width, shared, dtype=dtype, rngs=rngs)
        self.o = _linear(width, width, std=output_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, length: int) -> jax.Array:
        """Returns the output (n * length, width) for x (n * length, width)."""

        def in_heads(y: jax.Array) -> jax.Array:
            return y.reshape(-1, length, y.shape[1] // self.channels, self.channels).swapaxes(1, 2)

        q, k, v = (in_heads(layer(x)) for layer in (self.q, self.k, self.v))
        y = attend(rotate(q), rotate(k), v)
        return self.o(y.swapaxes(1, 2).reshape(x.shape))


class SwiGLU(nnx.Module):
    """Two layers, the first gated: `down(silu(gate(x)) * up(x))`.

    Args:
      width: channels of the input and of the output.
      hidden: channels between.
      output_std: of the last kernel's initial weights.
      dtype: of the computation.
      rngs: where the weights come from.
    """

    def __init__(
        self, width: int, hidden: int, *, output_std: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.gate = _linear(width, hidden, dtype=dtype, rngs=rngs)
        self.up = _linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = _linear(hidden, width, std=output_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the output (tokens, width) for x (tokens, width)."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and MLP, each after a normalization and beside a shortcut."""

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        *,
        output_std: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = rms_norm(width, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            width, heads, kv_heads, output_std=output_std, dtype=dtype, rngs=rngs
        )
        self.mlp_norm = rms_norm(width, epsilon=NORM_EPSILON, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(width, hidden, output_std=output_std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, length: int) -> jax.Array:
        """Returns the output (n * length, width) for x (n * length, width)."""
        x = x + self.attention(self.attention_norm(x), length)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Touvron et al., "LLaMA: Open and Efficient Foundation Language Models", 2023.

    Weights start normal with deviation 0.02; those that end a shortcut, of o and down, with
    0.02 / sqrt(2 depth), so that the sum over all blocks starts as wide whatever the depth.

    Args:
      num_classes: size of the vocabulary; 256: bytes.
      width: channels of the embedding.
      depth: number of blocks.
      heads: of the queries; they divide `width` into even numbers of channels.
      kv_heads: of keys and values, a divisor of `heads`; 0: as many as `heads`.
      hidden: channels of the MLP.
      context: tokens that the network is made for; fewer or more will do.
      dtype: of the computation; parameters and logits are float32.
      rngs: where the weights come from.

    Raises:
      ValueError: if the heads do not divide what they share.
    """

    constrained = "blocks/.*/(attention/[qkvo]|mlp/(gate|up|down))/kernel"
    flattened: ClassVar[dict[str, tuple[int, int, int]]] = {}

    def __init__(
        self,
        num_classes: int = 256,
        *,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        kv_heads: int = 0,
        hidden: int = 384,
        context: int = 128,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kv_heads = kv_heads or heads
        if width % (2 * heads) or heads % kv_heads:
            raise ValueError(
                f"width={width}, heads={heads}, kv_heads={kv_heads}: heads must divide width into "
                "even numbers of channels, and kv_heads must divide heads"
            )
        self.heads, self.kv_heads, self.context = heads, kv_heads, context
        self.embed = nnx.Embed(
            num_classes,
            width,
            dtype=dtype,
            embedding_init=nnx.initializers.normal(_STD),
            rngs=rngs,
        )
        self.blocks = nnx.List(
            [
                Block(
                    width,
                    heads,
                    kv_heads,
                    hidden,
                    output_std=_STD / (2 * depth) ** 0.5,
                    dtype=dtype,
                    rngs=rngs,
                )
                for _ in range(depth)
            ]
        )
        self.norm = rms_norm(width, epsilon=NORM_EPSILON, dtype=jnp.float32, rngs=rngs)
        self.head = _linear(width, num_classes, dtype=jnp.float32, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Returns float32 logits (n, length, num_classes) for tokens (n, length); ignores `rngs`.

        Those at a position are of the token that follows it.
        """
        del rngs
        # One axis of tokens: XLA multiplies larger matrices then, and a step takes half the time.
        x = self.embed(tokens.ravel())
        for block in self.blocks:
            x = block(x, tokens.shape[-1])
        return self.head(self.norm(x)).reshape(*tokens.shape, -1)


def rotate(x: jax.Array) -> jax.Array:
    """Rotates each pair of neighbouring channels by an angle that grows with the position.

    Of c channels, 2i and 2i + 1 at position t turn by t / 10000^(2i / c), so that the product of a
    query and a key depends on the distance of their positions alone.

    Args:
      x: queries or keys, (n, heads, length, channels).

    Reference: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    length, channels = x.shape[-2:]
    frequencies = ROTARY_BASE ** -(jnp.arange(0, channels, 2) / channels)
    angles = jnp.arange(length)[:, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def neighbouring_pairs(kernel: jax.Array, heads: int) -> jax.Array:
    """Reorders a kernel of queries or keys from pairs half a head apart to pairs of neighbours.

    Hugging Face's Llama pairs channel i of a head's c with i + c/2, which are 2i and 2i + 1 here.
    Products of queries and keys stay the same if both are reordered.

    Args:
      kernel: of the layer, (inputs, heads * c).
      heads: of its output; for keys, those of the keys.

    Raises:
      ValueError: if the outputs are not `heads` times an even number of channels.
    """
    inputs, outputs = kernel.shape
    if outputs % (2 * heads):
        raise ValueError(
            f"{outputs} outputs are not {heads} heads of an even number of channels each"
        )
    halves = kernel.reshape(inputs, heads, 2, -1)
    return halves.swapaxes(2, 3).reshape(inputs, outputs)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q k' / sqrt(c)) v over the positions up to each query's own.

    Args:
      q: (n, heads, length, c).
      k: (n, kv_heads, length, c); each serves as many neighbouring heads as there are for one.
      v: likewise.
    """
    n, kv_heads, length, channels = k.shape
    grouped = q.reshape(n, kv_heads, -1, length, channels)
    scores = jnp.einsum("nkgtc,nksc->nkgts", grouped, k, preferred_element_type=jnp.float32)
    seen = jnp.tril(jnp.ones((length, length), bool))
    scores = jnp.where(seen, scores / channels**0.5, -jnp.inf)
    shares = jax.nn.softmax(scores).astype(v.dtype)
    return jnp.einsum("nkgts,nksc->nkgtc", shares, v).reshape(q.shape)


def _linear(
    features_in: int, features_out: int, std: float = _STD, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        features_in,
        features_out,
        use_bias=False,
        dtype=dtype,
        kernel_init=nnx.initializers.normal(std),
        rngs=rngs,
    )
