import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import ModelConfig, RopeScalingConfig
from jaxplan.models.attention import (
    attend,
    attend_causally,
    attend_packed,
    check_attention,
    compiled_kernels,
    rope_frequencies,
    rotate,
    rotation_at,
)
from jaxplan.models.visibility import visible
from tests.fakes import random_stream


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def softmax_attention(query, keys, values, mask):
    """One head and one query at a time, in float64."""
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    out = np.zeros(query.shape)
    group = query.shape[2] // keys.shape[1]
    for b, t, n in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        scores = keys[b, n // group, seen] @ query[b, t, n] / np.sqrt(query.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ values[b, n // group, seen]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("cuts", [(), (4,), (3, 9)])
def test_attention_over_buffers_is_softmax_attention_over_all(kv_heads, length, cuts):
    rng = np.random.default_rng(0)
    query = normal(rng, 2, length, 4, 8)
    keys, values = (normal(rng, 2, kv_heads, 11, 8) for _ in range(2))
    mask = rng.random((2, length, 11)) < 0.4
    mask[:, :, 5] = True
    actual = attend(
        query,
        tuple(jnp.split(keys, cuts, axis=2)),
        tuple(jnp.split(values, cuts, axis=2)),
        jnp.asarray(mask),
    )
    expected = softmax_attention(query, keys, values, mask)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_gradients_of_merged_buffers_are_those_of_one_buffer():
    rng = np.random.default_rng(1)
    query, keys, values = (
        normal(rng, 1, 5, 2, 4),
        normal(rng, 1, 2, 6, 4),
        normal(rng, 1, 2, 6, 4),
    )
    mask = jnp.asarray(rng.random((1, 5, 6)) < 0.7).at[:, :, 0].set(True)

    def loss(query, keys, values, cuts):
        buffers = [tuple(jnp.split(x, cuts, axis=2)) for x in (keys, values)]
        return jnp.sum(jnp.sin(attend(query, *buffers, mask)))

    one, many = (
        jax.grad(loss, argnums=(0, 1, 2))(query, keys, values, cuts)
        for cuts in ((), (2, 3))
    )
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_causal_attention_in_blocks_is_softmax_attention(length):
    rng = np.random.default_rng(3)
    query = normal(rng, 1, length, 2, 4)
    keys, values = (normal(rng, 1, 1, length, 4) for _ in range(2))
    mask = np.tril(rng.random((1, length, length)) < 0.5) | np.eye(length, dtype=bool)
    actual = attend_causally(query, keys, values, jnp.asarray(mask))
    expected = softmax_attention(query, keys, values, mask)
    np.testing.assert_allclose(actual, expected, atol=2e-6)


def test_a_token_that_sees_nothing_is_finite():
    ones = jnp.ones((1, 1, 3, 4))
    mixed = attend(jnp.ones((1, 2, 1, 4)), (ones,), (ones,), jnp.zeros((1, 2, 3), bool))
    assert jnp.isfinite(mixed).all()


def test_rotation_multiplies_complex_numbers():
    config = ModelConfig(head_dim=8)
    rng = np.random.default_rng(2)
    heads = normal(rng, 2, 5, 3, 8)
    position = rng.integers(0, 1000, (2, 5)).astype(np.int32)
    frequencies = 10_000.0 ** -(np.arange(4) / 4)
    turn = np.exp(1j * position[:, :, None] * frequencies)[:, :, None]
    turned = (heads[..., :4] + 1j * np.asarray(heads[..., 4:])) * turn
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    actual = rotate(heads, rotation_at(jnp.asarray(position), config))
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_llama3_scaling_slows_only_what_turns_rarely():
    scaling = RopeScalingConfig(
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = ModelConfig(head_dim=64, rope_theta=500_000.0)
    scaled = ModelConfig(head_dim=64, rope_theta=500_000.0, rope_scaling=scaling)
    before, after = rope_frequencies(plain), rope_frequencies(scaled)
    for frequency, slowed in zip(before, after, strict=True):
        wavelength = 2 * np.pi / frequency
        if wavelength < 8192 / 4:
            expected = frequency
        elif wavelength > 8192 / 1:
            expected = frequency / 8
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * frequency / 8 + smooth * frequency
        np.testing.assert_allclose(slowed, expected, rtol=1e-12)
    assert len(np.unique(np.round(before / after, 6))) > 2


def packed_example():
    """Two packed streams with turns, plans, deaths and padding, and what they see."""
    rng = np.random.default_rng(3)
    _, meta = random_stream(rng, 2, 70)
    mask = visible(meta, meta, 3)
    query = normal(rng, 2, 70, 4, 8)
    key, value = (normal(rng, 2, 70, 2, 8) for _ in range(2))
    return query, key, value, mask


@pytest.mark.parametrize("implementation", ["xla", "tokamax"])
def test_every_implementation_attends_by_the_same_mask(implementation):
    if implementation == "tokamax":
        pytest.importorskip("tokamax")
    query, key, value, mask = packed_example()
    sees = np.asarray(mask).any(axis=-1)
    assert not sees.all()  # padding sees nothing

    def graded(implementation):
        def loss(query, key, value):
            mixed = attend_packed(query, key, value, mask, implementation)
            mixed = jnp.where(sees[:, :, None, None], mixed, 0)
            return jnp.sum(jnp.sin(mixed)), mixed

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)

    (_, mixed), grads = jax.jit(graded(implementation))(query, key, value)
    heads_first = (array.swapaxes(1, 2) for array in (key, value))
    expected = softmax_attention(
        query, *heads_first, np.where(sees[..., None], mask, True)
    )
    np.testing.assert_allclose(mixed[sees], expected[sees], atol=2e-6)
    _, own = jax.jit(graded("xla"))(query, key, value)
    for a, b in zip(grads, own, strict=True):
        assert jnp.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_attention_that_cannot_run_here_is_refused_with_advice():
    check_attention(ModelConfig(), "cpu")
    cudnn = ModelConfig(attention="cudnn", compute_dtype="bfloat16")
    check_attention(cudnn, "gpu")
    with pytest.raises(ValueError, match=r"needs an NVIDIA GPU .* are cpu.*=xla"):
        check_attention(cudnn, "cpu")
    with pytest.raises(ValueError, match="compute_dtype is float32"):
        check_attention(ModelConfig(attention="cudnn"), "gpu")
    if importlib.util.find_spec("tokamax") is None:
        with pytest.raises(ValueError, match=r"pip install 'jaxplan\[tokamax\]'"):
            check_attention(ModelConfig(attention="tokamax"), "cpu")


def test_xla_attends_without_foreign_kernels():
    config = ModelConfig(heads=2, kv_heads=1, head_dim=8)
    assert compiled_kernels(config, 16) == []
