"""What is read off a hidden state: the next token's logits, the state's value.

Logits of a whole packed batch do not fit into memory for a large vocabulary, so
losses are computed over tokens in chunks.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxplan.models.params import LlamaParams, ValueParams


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
    inner = jax.nn.silu(wide @ params.hidden + bias)
    return inner @ params.out + params.out_bias


def map_token_chunks(fn: Callable[..., Any], chunk: int, *arrays: Any) -> Any:
    """Apply ``fn`` to tokens, ``chunk`` at a time, remembering nothing in between.

    The backward pass computes every chunk again, so what ``fn`` builds inside, such as
    logits, exists for one chunk only, in both passes.

    Args:
        fn: maps pytrees of arrays [chunk, ...] to a pytree of arrays [chunk, ...]; what
            it closes over is differentiated, too.
        chunk: tokens per call; the last chunk is filled up with zeros.
        arrays: pytrees of arrays whose first axis is tokens.
    """
    num_tokens = jax.tree.leaves(arrays)[0].shape[0]
    padding = -num_tokens % chunk

    def split(x):
        padded = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, chunk, *x.shape[1:])

    def join(y):
        return y.reshape(-1, *y.shape[2:])[:num_tokens]

    rematerialised = jax.checkpoint(fn)
    chunks = jax.tree.map(split, arrays)
    return jax.tree.map(join, lax.map(lambda args: rematerialised(*args), chunks))
