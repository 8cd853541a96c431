"""A Llama on packed streams: RMSNorm, rotary positions, grouped queries, SwiGLU.

The pieces of a layer are shared with ``jaxplan.models.cache``; what differs is only
where keys and values are kept.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxplan.config.schema import ModelConfig
from jaxplan.core.mesh import constrain
from jaxplan.models.attention import Rotation, attend_packed, rotate, rotation_at
from jaxplan.models.lora import low_rank
from jaxplan.models.params import LayerParams, LlamaParams, cast_params
from jaxplan.models.visibility import TokenMeta, visible

# query [B, T, N, H], new keys and new values [B, T, K, H] -> mixed values [B, T, N, H]
Attention = Callable[[Array, Array, Array], Float[Array, "B T N H"]]

# What ``jax.checkpoint`` keeps of a layer besides its input. Scores and weights of
# attention, which grow with the square of a stream's length, are never kept.
_KEPT = {
    "layer": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rms_norm(
    x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "*batch D"]:
    """Root-mean-square normalisation in float32 (arXiv:1910.07467)."""
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(wide**2, axis=-1, keepdims=True)
    normed = wide * lax.rsqrt(mean_square + eps)
    return (normed * jnp.broadcast_to(scale, x.shape)).astype(x.dtype)


def layer_step(
    x: Float[Array, "B T D"],
    layer: LayerParams,
    rotation: Rotation,
    attention: Attention,
    config: ModelConfig,
) -> Float[Array, "B T D"]:
    """One layer: attention, then feed-forward, each added to the residual stream."""
    normed = rms_norm(x, layer.attention_norm, config.norm_eps)
    linear = partial(_linear, layer=layer, config=config)
    query = linear("query", "td,dnh->tnh", normed)
    key = linear("key", "td,dkh->tkh", normed)
    value = linear("value", "td,dkh->tkh", normed)
    mixed = attention(rotate(query, rotation), rotate(key, rotation), value)
    x = x + linear("attention_out", "tnh,nhd->td", mixed)

    normed = rms_norm(x, layer.ffn_norm, config.norm_eps)
    gate = linear("gate", "td,df->tf", normed)
    up = linear("up", "td,df->tf", normed)
    gated = jax.nn.silu(gate) * up
    return x + linear("down", "tf,fd->td", gated)


def _linear(name, subscripts, x, layer, config):
    """A projection, with its bias and its adapter where it has them.

    The tokens of all lanes are rows of one matrix: on a CPU the gradient of a product
    with two axes of tokens takes twice as long.
    """
    lanes_and_tokens = x.shape[:2]
    x = x.reshape(-1, *x.shape[2:])
    out = jnp.einsum(subscripts, x, getattr(layer, name))
    bias = getattr(layer, f"{name}_bias")
    if bias is not None:
        out = out + jnp.broadcast_to(bias, out.shape)
    if layer.lora is not None and name in layer.lora:
        out = out + low_rank(subscripts, x, layer.lora[name], config.lora.scale)
    return out.reshape(*lanes_and_tokens, *out.shape[1:])


def forward(
    params: LlamaParams,
    tokens: Int[Array, "B S"],
    meta: TokenMeta,
    config: ModelConfig,
    history: int,
) -> Float[Array, "B S D"]:
    """Hidden states of packed streams, after the final norm.

    Args:
        params: with stacked layers.
        tokens: ids; what stands at padding does not matter.
        meta: one entry per token; positions increase along a row.
        config: of the model.
        history: turns whose observations and actions are visible.
    """
    params = cast_params(params, config)
    rotation = rotation_at(meta.position, config)
    mask = visible(meta, meta, history)

    def attention(query, key, value):
        return attend_packed(query, key, value, mask, config.attention)

    # Said here, or the compiler may split activations like the weights they meet.
    def scan_layer(x, layer):
        x = layer_step(x, layer, rotation, attention, config)
        return constrain(x, "lanes"), None

    step = scan_layer
    if config.remat != "none":
        policy = _KEPT[config.remat]
        step = jax.checkpoint(scan_layer, prevent_cse=False, policy=policy)
    x, _ = lax.scan(step, constrain(params.embed[tokens], "lanes"), params.layers)
    return rms_norm(x, params.final_norm, config.norm_eps)
