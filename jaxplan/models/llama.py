"""A Llama on packed streams: RMSNorm, rotary positions, grouped queries, SwiGLU.

The pieces of a layer are shared with ``jaxplan.models.cache``; what differs is only
where keys and values are kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxplan.config.schema import ModelConfig
from jaxplan.core.mesh import constrain
from jaxplan.models.attention import Rotation, attend_packed, rotate, rotation_at
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
    query = _linear("btd,dnh->btnh", normed, layer.query, layer.query_bias)
    key = _linear("btd,dkh->btkh", normed, layer.key, layer.key_bias)
    value = _linear("btd,dkh->btkh", normed, layer.value, layer.value_bias)
    mixed = attention(rotate(query, rotation), rotate(key, rotation), value)
    out = layer.attention_out, layer.attention_out_bias
    x = x + _linear("btnh,nhd->btd", mixed, *out)

    normed = rms_norm(x, layer.ffn_norm, config.norm_eps)
    gate = _linear("btd,df->btf", normed, layer.gate, layer.gate_bias)
    up = _linear("btd,df->btf", normed, layer.up, layer.up_bias)
    gated = jax.nn.silu(gate) * up
    return x + _linear("btf,fd->btd", gated, layer.down, layer.down_bias)


def _linear(subscripts, x, weights, bias):
    out = jnp.einsum(subscripts, x, weights)
    return out if bias is None else out + jnp.broadcast_to(bias, out.shape)


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
