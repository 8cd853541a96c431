import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.models.cache import BLOCK, block_sizes, extend, init_cache
from jaxplan.models.llama import forward
from jaxplan.models.params import init_params, unstack_layers
from tests.fakes import TINY_MODEL, TINY_VOCAB, plain_meta, random_stream

LANES, LENGTH, HISTORY = 3, BLOCK + 40, 3

extend_jit = jax.jit(extend, static_argnames=("config", "history"))


@pytest.fixture(scope="module")
def llama():
    return init_params(jax.random.key(0), TINY_MODEL, TINY_VOCAB).llama


def next_chunk(tokens, meta, cursor, chunk):
    """The tokens at each lane's cursor; past the end of the stream, its last one."""
    index = jnp.minimum(cursor[:, None] + jnp.arange(chunk)[None], tokens.shape[1] - 1)
    take = partial(jnp.take_along_axis, indices=index, axis=1)
    return take(tokens), jax.tree.map(take, meta)


def read(llama, cache, tokens, meta, lengths, chunk, config=TINY_MODEL):
    part, part_meta = next_chunk(tokens, meta, cache.cursor, chunk)
    return extend_jit(
        llama, cache, part, part_meta, lengths, config=config, history=HISTORY
    )


def extended(llama, tokens, meta, chunks, seed, config=TINY_MODEL):
    """Read streams in ragged chunks; return hidden states and the cache."""
    rng = np.random.default_rng(seed)
    llama = unstack_layers(llama)
    cache = init_cache(config, LANES, LENGTH, config.compute_dtype)
    hidden = np.zeros((LANES, LENGTH, config.width), np.float32)
    while (cache.cursor < LENGTH).any():
        chunk = int(rng.choice(chunks))
        lengths = rng.integers(0, chunk + 1, LANES)
        lengths = np.minimum(lengths, LENGTH - np.asarray(cache.cursor))
        lengths = jnp.asarray(lengths, jnp.int32)
        new, longer = read(llama, cache, tokens, meta, lengths, chunk, config)
        for lane in range(LANES):
            start, end = int(cache.cursor[lane]), int(longer.cursor[lane])
            hidden[lane, start:end] = new[lane, : end - start]
        cache = longer
    return hidden, cache


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reading_bit_by_bit_equals_reading_at_once(kv_heads):
    config = dataclasses.replace(TINY_MODEL, kv_heads=kv_heads)
    llama = init_params(jax.random.key(0), config, TINY_VOCAB).llama
    tokens, meta = random_stream(np.random.default_rng(kv_heads), LANES, LENGTH)
    hidden, _ = extended(llama, tokens, meta, (1, 30), kv_heads, config)
    expected = jax.jit(forward, static_argnums=(3, 4))(
        llama, tokens, meta, config, HISTORY
    )
    real = np.asarray(meta.episode) != 0
    np.testing.assert_allclose(hidden[real], expected[real], atol=1e-5)


@pytest.mark.parametrize(
    "capacity", [1, 100, BLOCK, 300, 4 * BLOCK, 4 * BLOCK + 3, 9999]
)
def test_blocks_are_few_and_hold_the_capacity(capacity):
    sizes = block_sizes(capacity)
    assert sum(sizes) == capacity
    assert len(sizes) <= 4
    assert len(set(sizes[:-1])) <= 1
    assert sizes[-1] <= sizes[0]


def test_a_lane_of_length_zero_is_untouched_bit_for_bit(llama):
    tokens, meta = random_stream(np.random.default_rng(0), LANES, LENGTH)
    llama = unstack_layers(llama)
    cache = init_cache(TINY_MODEL, LANES, LENGTH, jnp.float32)
    lengths = jnp.array([20, 9, 14])
    _, cache = read(llama, cache, tokens, meta, lengths, 20)
    hidden, after = read(llama, cache, tokens, meta, jnp.array([5, 0, 20]), 20)
    jax.tree.map(
        lambda old, new: np.testing.assert_array_equal(old[1], new[1]), cache, after
    )
    np.testing.assert_array_equal(after.cursor, [25, 9, 34])
    assert jnp.isfinite(hidden).all()
    # Of the first lane only the five new slots differ.
    changed = np.asarray(after.keys[0][0][0] != cache.keys[0][0][0]).any(axis=(0, 2))
    np.testing.assert_array_equal(np.flatnonzero(changed), np.arange(20, 25))


def test_a_cursor_set_back_forgets_what_came_after(llama):
    tokens, meta = random_stream(np.random.default_rng(1), LANES, LENGTH)
    llama = unstack_layers(llama)
    empty = init_cache(TINY_MODEL, LANES, LENGTH, jnp.float32)
    lengths = jnp.full(LANES, 20, jnp.int32)
    _, prefix = read(llama, empty, tokens, meta, lengths, 20)
    expected, _ = read(llama, prefix, tokens, meta, lengths, 20)

    rejected, rejected_meta = next_chunk(tokens, meta, prefix.cursor, 20)
    _, detour = extend_jit(
        llama,
        prefix,
        rejected[:, ::-1],
        rejected_meta,
        lengths,
        config=TINY_MODEL,
        history=HISTORY,
    )
    back = dataclasses.replace(detour, cursor=prefix.cursor)
    actual, _ = read(llama, back, tokens, meta, lengths, 20)
    np.testing.assert_array_equal(actual, expected)


def test_stacked_layers_are_refused_with_advice(llama):
    cache = init_cache(TINY_MODEL, 1, 8, jnp.float32)
    tokens, one = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    with pytest.raises(ValueError, match="unstack_layers"):
        extend(llama, cache, tokens, plain_meta(1, 1), one, TINY_MODEL, HISTORY)


@pytest.mark.parametrize("chunk", [1, 4])
def test_a_decode_loop_writes_in_place(chunk):
    # Keys and values outweigh all else: a copy of one layer's would be seen.
    config = dataclasses.replace(TINY_MODEL, head_dim=32)
    lanes, capacity = 16, 4 * BLOCK
    assert len(block_sizes(capacity)) == 4
    llama = unstack_layers(init_params(jax.random.key(0), config, TINY_VOCAB).llama)

    def decode(llama, cache):
        def step(cache, _):
            meta = plain_meta(lanes, chunk)
            position = meta.position + cache.cursor[:, None]
            meta = dataclasses.replace(meta, position=position)
            tokens = jnp.zeros((lanes, chunk), jnp.int32)
            lengths = jnp.full(lanes, chunk, jnp.int32)
            hidden, cache = extend(llama, cache, tokens, meta, lengths, config, HISTORY)
            return cache, jnp.sum(hidden)

        return jax.lax.scan(step, cache, None, 8)

    cache = jax.eval_shape(lambda: init_cache(config, lanes, capacity, jnp.float32))
    compiled = jax.jit(decode, donate_argnums=1).lower(llama, cache).compile()
    layer_bytes = sum(block.size * block.dtype.itemsize for block in cache.keys[0])
    assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes
    shape = ",".join(map(str, cache.keys[0][0].shape))
    copies = re.findall(
        rf"= f32\[{shape}\]\S* (copy|slice|transpose|concatenate)\(", compiled.as_text()
    )
    assert not copies
