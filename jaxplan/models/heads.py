"""What is read off a hidden state: the next token's logits, the state's value.

Logits of a whole packed batch do not fit into memory for a large vocabulary, so
losses are computed over tokens in chunks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxplan.models.params import LlamaParams, ValueParams

_LOGITS_AT_ONCE = 2**27  # half a GiB in float32
_MOST_TOKENS = 4096


def lm_logits(
    params: LlamaParams, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch V"]:
    """Logits of the next token, accumulated in float32."""
    head = params.embed.T if params.lm_head is None else params.lm_head
    return jnp.matmul(
        hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def value(
    params: ValueParams, hidden: Float[Array, "*batch D"]
) -> Float[Array, "*batch"]:
    """Value of the state a hidden state describes, float32 throughout."""
    wide = hidden.astype(jnp.float32)
    bias = jnp.broadcast_to(params.hidden_bias, wide.shape)
    product = partial(jnp.matmul, precision="highest")  # a GPU's default is coarser
    inner = jax.nn.silu(product(wide, params.hidden) + bias)
    return product(inner, params.out) + params.out_bias


def chunk_tokens(params: LlamaParams) -> int:
    """Tokens whose logits exist at one time: 4096, or fewer of a large vocabulary."""
    vocab_size = params.embed.shape[0]
    return max(1, min(_MOST_TOKENS, _LOGITS_AT_ONCE // vocab_size))


def map_token_chunks(fn: Callable[..., Any], chunk: int, *arrays: Any) -> Any:
    """Apply ``fn`` to tokens, ``chunk`` at a time, remembering nothing in between.

    The backward pass computes every chunk again, so what ``fn`` builds inside, such as
    logits, exists for one chunk only, in both passes. A chunk takes some tokens of
    every lane, so lanes that are split over devices stay where they are.

    Args:
        fn: maps pytrees of arrays [tokens, ...] to a pytree of arrays [tokens, ...];
            what it closes over is differentiated, too.
        chunk: tokens per call at most, but one of every lane at least; the last chunk
            is filled up with zeros.
        arrays: pytrees of arrays [B, M, ...] with M tokens of every lane.
    """
    lanes, length = jax.tree.leaves(arrays)[0].shape[:2]
    width = min(length, max(1, chunk // lanes))
    padding = -length % width

    def split(x):
        padded = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
        return jnp.swapaxes(padded.reshape(lanes, -1, width, *x.shape[2:]), 0, 1)

    def join(y):
        return jnp.swapaxes(y, 0, 1).reshape(lanes, -1, *y.shape[3:])[:, :length]

    def of_chunk(args):
        flat = jax.tree.map(lambda x: x.reshape(lanes * width, *x.shape[2:]), args)
        results = jax.checkpoint(fn)(*flat)
        return jax.tree.map(lambda y: y.reshape(lanes, width, *y.shape[1:]), results)

    return jax.tree.map(join, lax.map(of_chunk, jax.tree.map(split, arrays)))
