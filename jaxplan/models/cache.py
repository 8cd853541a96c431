"""A Llama on growing streams: new tokens in, keys and values kept, nothing re-read.

Layers are unrolled and every layer owns its buffers, so that inside a donated scan
carry each write happens in place; a stacked cache would be copied at every token. A
lane's stream is cut into blocks, a buffer each, and blocks that no lane has reached
are not read: slicing one long buffer instead would copy what it keeps. How many blocks
that are is decided once for all layers, as an accelerator waits for its host at each
such decision. The lanes that count are those of one device (``core.mesh.each_shard``),
so nobody is asked.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from jaxplan.config.schema import ModelConfig
from jaxplan.core.lifted import overall_max
from jaxplan.core.mesh import constrain
from jaxplan.models.attention import attend, rotation_at
from jaxplan.models.llama import layer_step, rms_norm
from jaxplan.models.params import LlamaParams, cast_params
from jaxplan.models.visibility import NO_PLAN, PADDING_EPISODE, TokenMeta, visible

BLOCK = 128  # tokens of one buffer at least
MOST_BLOCKS = 4  # a program holds the layers once for each number it may read

Blocks = tuple[Float[Array, "B K _ H"], ...]  # one layer's buffers, in stream order


@chex.dataclass(frozen=True)
class Cache:
    """Keys and values of every lane's stream so far.

    Attributes:
        keys: of each layer.
        values: of each layer.
        meta: of the stored tokens; what stands at or after the cursor is never seen.
        cursor: tokens stored, per lane. Setting it back forgets the tokens after it.
    """

    keys: tuple[Blocks, ...]
    values: tuple[Blocks, ...]
    meta: TokenMeta
    cursor: Int[Array, " B"]


def block_sizes(capacity: int) -> list[int]:
    """Tokens of each buffer of a stream of ``capacity`` tokens."""
    size = max(BLOCK, -(-capacity // MOST_BLOCKS))
    return [min(size, capacity - start) for start in range(0, capacity, size)]


def init_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike
) -> Cache:
    """Make a cache with room for ``capacity`` tokens in each of ``batch`` lanes.

    Keys and values are stored as ``dtype``, as a rule the model's compute dtype.
    """

    def block(size: int) -> Float[Array, "B K _ H"]:
        shape = batch, config.kv_heads, size, config.head_dim
        return constrain(jnp.zeros(shape, dtype), "lanes", "kv_heads")

    def blocks() -> Blocks:
        return tuple(block(size) for size in block_sizes(capacity))

    def full(value: int) -> Int[Array, "B S"]:
        return jnp.full((batch, capacity), value, jnp.int32)

    meta = TokenMeta(
        position=full(0),
        episode=full(PADDING_EPISODE),
        turn=full(0),
        plan=full(NO_PLAN),
        active_plan=full(0),
    )
    return Cache(
        keys=tuple(blocks() for _ in range(config.layers)),
        values=tuple(blocks() for _ in range(config.layers)),
        meta=meta,
        cursor=jnp.zeros(batch, jnp.int32),
    )


def extend(
    params: LlamaParams,
    cache: Cache,
    tokens: Int[Array, "B C"],
    meta: TokenMeta,
    lengths: Int[Array, " B"],
    config: ModelConfig,
    history: int,
) -> tuple[Float[Array, "B C D"], Cache]:
    """Append up to C tokens to every lane at its own cursor.

    A lane of length 0 is left as it is, bit for bit. Hidden states of the tokens that
    are not real are finite and mean nothing. Tokens beyond the capacity are dropped:
    the caller sees to it that there is room.

    Args:
        params: with unstacked layers; they are cast here unless ``cast_params`` has.
        cache: donate it, or carry it through a scan, and it is written in place.
        tokens: ids.
        meta: of the new tokens; ``position`` is the lane's cursor + 0, 1, ....
        lengths: how many of the C tokens are real, per lane.
        config: of the model.
        history: turns whose observations and actions are visible.

    Returns:
        Hidden states after the final norm, and the longer cache.
    """
    params = cast_params(params, config)
    layers = params.layers
    if not isinstance(layers, tuple):
        raise ValueError("extend: stacked layers; decode with unstack_layers(params)")
    rotation = rotation_at(meta.position, config)
    slots = _slots(cache, lengths, tokens.shape[1])
    stored = _write_meta(cache.meta, meta, slots)

    def through_layers(blocks, state):
        x, *cached = state
        live = sum(block.shape[2] for block in cache.keys[0][:blocks])
        seen = jax.tree.map(lambda values: values[:, :live], stored)
        mask = visible(meta, seen, history)
        keys, values = [], []
        for layer, old_keys, old_values in zip(layers, *cached, strict=True):

            def attention(query, key, value, old_keys=old_keys, old_values=old_values):
                keys.append(_write_blocks(old_keys, key, slots))
                values.append(_write_blocks(old_values, value, slots))
                return attend(query, keys[-1][:blocks], values[-1][:blocks], mask)

            x = layer_step(x, layer, rotation, attention, config)
        return x, tuple(keys), tuple(values)

    reach, capacity = overall_max(cache.cursor + lengths), stored.position.shape[1]
    state = params.embed[tokens], cache.keys, cache.values
    x, keys, values = _on_live_blocks(through_layers, state, reach, capacity)
    hidden = rms_norm(x, params.final_norm, config.norm_eps)
    longer = Cache(
        keys=keys,
        values=values,
        meta=stored,
        cursor=cache.cursor + lengths,
    )
    return hidden, longer


def _on_live_blocks(
    step: Callable[[int, Any], Any], state: Any, reach: Array, capacity: int
) -> Any:
    """Call ``step(blocks, state)`` with as few blocks as hold ``reach`` tokens."""
    sizes = block_sizes(capacity)
    if len(sizes) == 1:
        return step(1, state)
    live = jnp.clip(-(-reach // sizes[0]), 1, len(sizes))
    for blocks in range(1, len(sizes) + 1):
        # A loop of one iteration or none: a conditional would copy the cache.
        times = (live == blocks).astype(jnp.int32)
        state = lax.fori_loop(0, times, lambda _, s, n=blocks: step(n, s), state)
    return state


def _slots(cache, lengths, chunk):
    """Where in its lane each new token goes: past the end if it is not real."""
    batch, capacity = cache.meta.position.shape
    offset = jnp.broadcast_to(jnp.arange(chunk), (batch, chunk))
    is_real = offset < lengths[:, None]
    return jnp.where(is_real, cache.cursor[:, None] + offset, capacity)


def _write_meta(stored, new, slots):
    lane = jnp.arange(slots.shape[0])[:, None]

    def write(old, values):
        return old.at[lane, slots].set(values, mode="drop")

    return jax.tree.map(write, stored, new)


def _write_blocks(blocks, new, slots):
    """Write each token into the one block that has its slot."""
    lane = jnp.arange(slots.shape[0])[:, None]
    written, start = [], 0
    for block in blocks:
        size = block.shape[2]
        inside = (slots >= start) & (slots < start + size)
        local = jnp.where(inside, slots - start, size)
        written.append(block.at[lane, :, local].set(new, mode="drop"))
        start += size
    return tuple(written)
