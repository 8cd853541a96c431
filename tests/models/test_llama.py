import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.models.llama import forward
from jaxplan.models.params import init_params, unstack_layers
from jaxplan.models.visibility import NO_PLAN, visible
from tests.fakes import TINY_MODEL, TINY_VOCAB, plain_meta, random_stream

forward_jit = jax.jit(forward, static_argnames=("config", "history"))


@pytest.fixture(scope="module")
def llama():
    return init_params(jax.random.key(0), TINY_MODEL, TINY_VOCAB).llama


def gradient_reach(llama, tokens, meta, history, query):
    """Size of d hidden[query] / d embedding of each token, for one stream."""
    # Every position gets its own row of the embedding table.
    own_rows = dataclasses.replace(llama, embed=llama.embed[tokens[0]])
    rows = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]

    @jax.jit
    @jax.grad
    def reach(embed):
        params = dataclasses.replace(own_rows, embed=embed)
        hidden = forward(params, rows, meta, TINY_MODEL, history)
        return jnp.sum(jnp.sin(hidden[0, query]))

    return np.abs(reach(own_rows.embed)).sum(axis=1)


def reachable(meta, history, layers):
    """Which tokens can influence which through so many layers."""
    once = np.asarray(visible(meta, meta, history))[0]
    once = (once | np.eye(len(once), dtype=bool)).astype(int)
    return np.linalg.matrix_power(once, layers) > 0


@pytest.mark.parametrize("seed", range(4))
def test_gradients_are_exactly_zero_where_nothing_may_flow(llama, seed):
    rng = np.random.default_rng(seed)
    tokens, meta = random_stream(rng, 1, 40)
    history = 2
    allowed = reachable(meta, history, TINY_MODEL.layers)
    assert np.tril(~allowed).any()  # or this stream tests causality only
    real = np.flatnonzero(np.asarray(meta.episode[0]))
    for query in (real[-1], real[len(real) // 2]):
        flow = gradient_reach(llama, tokens, meta, history, int(query))
        np.testing.assert_array_equal(flow > 0, allowed[query])


def test_the_future_has_no_influence(llama):
    tokens, _ = random_stream(np.random.default_rng(0), 1, 12)
    flow = gradient_reach(llama, tokens, plain_meta(1, 12), 1, 6)
    np.testing.assert_array_equal(flow > 0, np.arange(12) <= 6)


def test_episodes_packed_into_one_stream_do_not_notice_each_other(llama):
    rng = np.random.default_rng(3)
    tokens = jnp.asarray(rng.integers(0, TINY_VOCAB, (1, 30)), jnp.int32)
    cuts = (0, 9, 22, 30)
    packed = plain_meta(1, 30)
    episode = np.zeros((1, 30), np.int32)
    for index, (start, end) in enumerate(itertools.pairwise(cuts)):
        episode[:, start:end] = index + 1
    packed = dataclasses.replace(packed, episode=jnp.asarray(episode))

    def loss(params, tokens, meta):
        hidden = forward(params, tokens, meta, TINY_MODEL, 1)
        return jnp.sum(jnp.sin(hidden)), hidden

    graded = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, together), gradient = graded(llama, tokens, packed)
    total = jax.tree.map(jnp.zeros_like, gradient)
    for start, end in itertools.pairwise(cuts):
        # Rotary positions are relative: an episode alone may start at 0.
        alone = graded(llama, tokens[:, start:end], plain_meta(1, end - start))
        (_, hidden), part = alone
        np.testing.assert_allclose(together[:, start:end], hidden, atol=1e-5)
        total = jax.tree.map(jnp.add, total, part)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(total), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4)


def test_rematerialisation_changes_no_gradient_and_keeps_less(llama):
    tokens, meta = random_stream(np.random.default_rng(4), 2, 24)

    def gradient(config):
        def loss(params):
            return jnp.sum(jnp.sin(forward(params, tokens, meta, config, 2)))

        def kept(params):
            return jax.tree.leaves(jax.vjp(loss, params)[1])

        kept_numbers = sum(leaf.size for leaf in jax.eval_shape(kept, llama))
        return jax.jit(jax.grad(loss))(llama), kept_numbers

    plain, most = gradient(dataclasses.replace(TINY_MODEL, remat="none"))
    fewest = most
    for policy in ("dots", "layer"):
        remat, fewer = gradient(dataclasses.replace(TINY_MODEL, remat=policy))
        assert fewer < fewest
        fewest = fewer
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_bfloat16_computes_in_bfloat16_and_stays_close(llama):
    tokens, meta = random_stream(np.random.default_rng(5), 2, 24)
    config = dataclasses.replace(TINY_MODEL, compute_dtype="bfloat16")
    hidden = forward_jit(llama, tokens, meta, config=config, history=2)
    exact = forward_jit(llama, tokens, meta, config=TINY_MODEL, history=2)
    assert hidden.dtype == jnp.bfloat16
    error = np.abs(np.asarray(hidden, np.float32) - exact)[np.asarray(meta.episode) > 0]
    assert error.mean() < 0.03


def test_padding_gives_no_nan_and_no_influence(llama):
    tokens, meta = random_stream(np.random.default_rng(6), 1, 24)
    meta = jax.tree.map(lambda values: values.at[:, 18:].set(0), meta)
    meta = dataclasses.replace(meta, plan=meta.plan.at[:, 18:].set(NO_PLAN))
    hidden = forward_jit(llama, tokens, meta, config=TINY_MODEL, history=2)
    other = tokens.at[:, 18:].set(7)
    again = forward_jit(llama, other, meta, config=TINY_MODEL, history=2)
    assert jnp.isfinite(hidden).all()
    np.testing.assert_array_equal(hidden[:, :18], again[:, :18])


def test_stacked_layers_are_told_from_unstacked(llama):
    layers = unstack_layers(llama).layers
    assert len(layers) == TINY_MODEL.layers
    np.testing.assert_array_equal(layers[1].down, llama.layers.down[1])
