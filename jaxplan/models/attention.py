"""Rotary positions and grouped-query attention.

Both ways through the Llama end here, so sampling and training use the same formula.
Within packed streams ``model.attention`` chooses who computes it: XLA from ``attend``,
or a library's kernels that keep no scores. All get the same mask.
"""

import functools
import importlib.util
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxplan.config.schema import ModelConfig, RopeScalingConfig

# Finite, so that a padding token that sees nothing averages instead of giving NaN.
NEVER = -1e30
# XLA's CPU matrix product wants its long side first; it matters for a handful of rows.
FEW_ROWS = 8


@chex.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of the rotary angle of every token and frequency."""

    cos: Float[Array, "B T H2"]
    sin: Float[Array, "B T H2"]


def rope_frequencies(config: ModelConfig) -> Float[np.ndarray, " H2"]:
    """Rotary frequencies in radians per token (arXiv:2104.09864, eq. 15)."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if config.rope_scaling is None:
        return frequencies
    return llama3_scaling(frequencies, config.rope_scaling)


def llama3_scaling(
    frequencies: Float[np.ndarray, " H2"], scaling: RopeScalingConfig
) -> Float[np.ndarray, " H2"]:
    """Slow the low frequencies down by ``factor`` and keep the high ones.

    Between the two a linear blend in the number of turns the frequency makes over the
    original context (transformers, ``_compute_llama3_parameters``).
    """
    context = scaling.original_max_position_embeddings
    turns = frequencies * context / (2 * math.pi)
    blend = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    keep = np.clip(blend, 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotation_at(position: Int[Array, "B T"], config: ModelConfig) -> Rotation:
    """Rotation of every token; float32, whatever the compute dtype."""
    frequencies = jnp.asarray(rope_frequencies(config), jnp.float32)
    angles = position[:, :, None].astype(jnp.float32) * frequencies[None, None]
    return Rotation(cos=jnp.cos(angles), sin=jnp.sin(angles))


def rotate(
    heads: Float[Array, "B T heads H"], rotation: Rotation
) -> Float[Array, "B T heads H"]:
    """Rotate channel i with channel i + H/2 (the layout of Hugging Face weights)."""
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(heads.dtype)


def attend(
    query: Float[Array, "B T N H"],
    keys: tuple[Float[Array, "B K _ H"], ...],
    values: tuple[Float[Array, "B K _ H"], ...],
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Softmax attention where N / K query heads share one key/value head.

    The S keys lie in one or more buffers; each is attended to by itself and the parts
    are merged exactly (arXiv:2205.14135, section 3.1). Scores and softmax are float32.
    """
    batch, length, heads, head_dim = query.shape
    kv_heads = keys[0].shape[1]
    group = heads // kv_heads
    # The heads of a group become more query rows: no key is repeated or read twice.
    rows = query.reshape(batch, length, kv_heads, group, head_dim)
    rows = rows.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    row_mask = jnp.tile(mask, (1, group, 1))[:, None]

    ends = np.cumsum([buffer.shape[2] for buffer in keys])
    parts = [
        _attend_part(rows, buffer, content, part_mask)
        for buffer, content, part_mask in zip(
            keys, values, jnp.split(row_mask, ends[:-1], axis=-1), strict=True
        )
    ]
    whole = functools.reduce(_merge, parts)
    mixed = (whole.mixed / whole.total).astype(query.dtype)
    mixed = mixed.reshape(batch, kv_heads, group, length, head_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(query.shape)


def attend_packed(
    query: Float[Array, "B S N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    mask: Bool[Array, "B S S"],
    implementation: str,
) -> Float[Array, "B S N H"]:
    """Attention within packed streams; no query sees a key that comes after it.

    What a query without any key gets is finite and means nothing.

    Args:
        query: N / K query heads share a head of keys and values.
        key: of the same tokens.
        value: of the same tokens.
        mask: which query sees which key, see ``visible``.
        implementation: ``xla``, ``cudnn`` or ``tokamax``, see ``check_attention``.
    """
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask[:, None], implementation="cudnn"
        )
    if implementation == "tokamax":
        return _tokamax().dot_product_attention(query, key, value, mask=mask[:, None])
    return attend_causally(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask)


def _tokamax() -> Any:
    tokamax = importlib.import_module("tokamax")
    flags = importlib.import_module("absl.flags").FLAGS
    if not flags.is_parsed():  # or it would read the command line, which is ours
        flags(["jaxplan"])
    return tokamax


def check_attention(config: ModelConfig, platform: str) -> None:
    """Refuse an implementation that cannot run here.

    Args:
        config: of the model.
        platform: of the devices: ``cpu``, ``gpu`` or ``tpu``.

    Raises:
        ValueError: what is missing, and what to do.
    """
    if config.attention == "cudnn" and (
        platform != "gpu" or config.compute_dtype != "bfloat16"
    ):
        raise ValueError(
            "model.attention=cudnn needs an NVIDIA GPU and model.compute_dtype="
            f"bfloat16; the devices are {platform}, and compute_dtype is "
            f"{config.compute_dtype}; model.attention=xla runs everywhere"
        )
    if config.attention == "tokamax" and not importlib.util.find_spec("tokamax"):
        raise ValueError(
            "model.attention=tokamax: the package tokamax is not installed; "
            "pip install 'jaxplan[tokamax]', or use model.attention=xla"
        )


def compiled_kernels(config: ModelConfig, length: int) -> list[str]:
    """Kernels outside of XLA that attention compiles to, forward and backward.

    The name in a config is a wish, and libraries fall back in silence; this asks the
    compiler. An empty list means that XLA made it all itself.

    Args:
        config: of the model.
        length: of a stream, in tokens.
    """
    heads = {
        name: jax.ShapeDtypeStruct(
            (1, length, number, config.head_dim), config.compute_dtype
        )
        for name, number in (("query", config.heads), ("key", config.kv_heads))
    }
    mask = jax.ShapeDtypeStruct((1, length, length), bool)

    def loss(query, key, value, mask):
        mixed = attend_packed(query, key, value, mask, config.attention)
        return jnp.sum(mixed.astype(jnp.float32))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    arguments = heads["query"], heads["key"], heads["key"], mask
    text = gradient.lower(*arguments).compile().as_text() or ""
    return sorted(set(re.findall(r'custom_call_target="([^"]+)"', text)))


def attend_causally(
    query: Float[Array, "B S N H"],
    keys: Float[Array, "B K S H"],
    values: Float[Array, "B K S H"],
    mask: Bool[Array, "B S S"],
) -> Float[Array, "B S N H"]:
    """Attention within a stream, where no query sees a key that comes after it.

    Queries go in blocks, each with the keys up to its own end: nearly half of the
    scores are never computed.
    """
    length = query.shape[1]
    block = max(64, -(-length // 8))  # at most eight, so that the program stays small
    ends = [min(start + block, length) for start in range(0, length, block)]
    return jnp.concatenate(
        [
            attend(
                query[:, start:end],
                (keys[:, :, :end],),
                (values[:, :, :end],),
                mask[:, start:end, :end],
            )
            for start, end in zip([0, *ends], ends, strict=False)
        ],
        axis=1,
    )


@chex.dataclass(frozen=True)
class _Part:
    """Attention to some of the keys, before the division by the softmax's sum."""

    mixed: Float[Array, "B K R H"]  # values, weighted by exp(score - peak)
    peak: Float[Array, "B K R 1"]  # the largest score
    total: Float[Array, "B K R 1"]  # sum of exp(score - peak)


def _attend_part(rows, keys, values, mask):
    if rows.shape[2] <= FEW_ROWS:
        scores = _float32_einsum("bksh,bkrh->bksr", keys, rows).swapaxes(2, 3)
    else:
        scores = _float32_einsum("bkrh,bksh->bkrs", rows, keys)
    scores = jnp.where(mask, scores * rows.shape[-1] ** -0.5, NEVER)
    # The peak cancels out of mixed / total, so it needs no gradient.
    peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - peak)
    return _Part(
        mixed=_float32_einsum("bkrs,bksh->bkrh", weights.astype(values.dtype), values),
        peak=peak,
        total=jnp.sum(weights, axis=-1, keepdims=True),
    )


def _merge(a: _Part, b: _Part) -> _Part:
    peak = jnp.maximum(a.peak, b.peak)
    scale_a, scale_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return _Part(
        mixed=a.mixed * scale_a + b.mixed * scale_b,
        peak=peak,
        total=a.total * scale_a + b.total * scale_b,
    )


def _float32_einsum(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
