import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.models.heads import lm_logits, map_token_chunks, value
from jaxplan.models.params import init_params
from tests.fakes import TINY_MODEL, TINY_VOCAB


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_products_with_the_head_in_float32(tied):
    config = dataclasses.replace(TINY_MODEL, tie_embeddings=tied)
    llama = init_params(jax.random.key(0), config, TINY_VOCAB).llama
    hidden = jax.random.normal(jax.random.key(1), (2, 3, config.width))
    logits = lm_logits(llama, hidden)
    head = np.asarray(llama.embed).T if tied else np.asarray(llama.lm_head)
    np.testing.assert_allclose(logits, np.asarray(hidden) @ head, atol=1e-5)
    assert lm_logits(llama, hidden.astype(jnp.bfloat16)).dtype == jnp.float32


def test_every_value_starts_at_zero_and_can_learn():
    params = init_params(jax.random.key(0), TINY_MODEL, TINY_VOCAB).value
    hidden = jax.random.normal(jax.random.key(1), (5, 32)).astype(jnp.bfloat16)
    assert (value(params, hidden) == 0).all()
    assert value(params, hidden).dtype == jnp.float32
    gradient = jax.grad(lambda params: jnp.mean(value(params, hidden) - 1))(params)
    assert jnp.abs(gradient.out).max() > 0


def test_the_value_head_is_a_two_layer_perceptron():
    keys = jax.random.split(jax.random.key(0), 5)
    params = init_params(keys[0], TINY_MODEL, TINY_VOCAB).value
    params = dataclasses.replace(
        params,
        hidden_bias=jax.random.normal(keys[1], (32,)),
        out=jax.random.normal(keys[2], (32,)),
        out_bias=jnp.float32(0.5),
    )
    hidden = np.asarray(jax.random.normal(keys[3], (2, 3, 32)), np.float64)
    inner = hidden @ np.asarray(params.hidden) + np.asarray(params.hidden_bias)
    expected = inner / (1 + np.exp(-inner)) @ np.asarray(params.out) + 0.5
    np.testing.assert_allclose(
        value(params, jnp.asarray(hidden, jnp.float32)), expected, rtol=1e-4, atol=1e-5
    )


def log_probs(llama, hidden, targets):
    logs = jax.nn.log_softmax(lm_logits(llama, hidden))
    picked = jnp.take_along_axis(logs, targets[:, None], axis=1)[:, 0]
    return {"log_prob": picked, "entropy": -jnp.sum(jnp.exp(logs) * logs, axis=1)}


@pytest.mark.parametrize("chunk", [1, 4, 6, 7, 100])
def test_chunks_change_neither_values_nor_gradients(chunk):
    llama = init_params(jax.random.key(0), TINY_MODEL, TINY_VOCAB).llama
    hidden = jax.random.normal(jax.random.key(1), (3, 7, 32))
    targets = jax.random.randint(jax.random.key(2), (3, 7), 0, TINY_VOCAB)

    def loss(llama, hidden, chunk):
        def score(hidden, targets):
            return log_probs(llama, hidden, targets)

        scores = map_token_chunks(score, chunk, hidden, targets)
        assert scores["entropy"].shape == (3, 7)
        weights = jnp.arange(21.0).reshape(3, 7)
        return jnp.sum(scores["log_prob"] * weights) + scores["entropy"].sum()

    graded = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    expected, gradient = graded(llama, hidden, 21)
    actual, chunked = graded(llama, hidden, chunk)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(chunked), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    vocab, width, chunk = 4096, 16, 32
    config = dataclasses.replace(TINY_MODEL, width=width)
    llama = jax.eval_shape(lambda: init_params(jax.random.key(0), config, vocab)).llama

    def temp_bytes(num_tokens):
        hidden = jax.ShapeDtypeStruct((4, num_tokens // 4, width), jnp.float32)
        targets = jax.ShapeDtypeStruct((4, num_tokens // 4), jnp.int32)

        def loss(llama, hidden, targets):
            def score(hidden, targets):
                return log_probs(llama, hidden, targets)

            scores = map_token_chunks(score, chunk, hidden, targets)
            return jnp.sum(scores["log_prob"])

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(llama, hidden, targets)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    growth = temp_bytes(1024) - temp_bytes(256)
    assert growth < 0.02 * (1024 - 256) * vocab * 4
