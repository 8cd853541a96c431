import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import LoraConfig
from jaxplan.core.specs import abstract_tensors
from jaxplan.models.cache import extend, init_cache
from jaxplan.models.llama import forward
from jaxplan.models.params import (
    agent_specs,
    init_params,
    join,
    lora_of,
    replace_lora,
    split_trained,
    unstack_layers,
)
from tests.fakes import TINY_MODEL, TINY_VOCAB, random_stream

LORA = LoraConfig(rank=3, alpha=5.0, rslora=True)
MODEL = dataclasses.replace(TINY_MODEL, lora=LORA)
LENGTH, HISTORY = 24, 2

forward_jit = jax.jit(forward, static_argnames=("config", "history"))
extend_jit = jax.jit(extend, static_argnames=("config", "history"))


def lively(llama, seed=5):
    """B drawn, too, or adapters would do nothing."""
    leaves, structure = jax.tree.flatten(lora_of(llama))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape) * 0.2
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return replace_lora(llama, jax.tree.unflatten(structure, drawn))


def merged(llama):
    """Weights with the adapters multiplied out, which then are left out."""
    layers = dict(vars(llama.layers))
    for name, adapter in lora_of(llama).items():
        depth, rank = adapter.b.shape[:2]
        flat = adapter.a.reshape(depth, -1, rank) @ adapter.b.reshape(depth, rank, -1)
        layers[name] += 5.0 / np.sqrt(3) * flat.reshape(layers[name].shape)
    bare = replace_lora(llama, None)
    whole = dataclasses.replace(bare.layers, **(layers | {"lora": None}))
    return dataclasses.replace(bare, layers=whole)


@pytest.fixture(scope="module")
def llama():
    return init_params(jax.random.key(0), MODEL, TINY_VOCAB).llama


@pytest.fixture(scope="module")
def stream():
    return random_stream(np.random.default_rng(3), 2, LENGTH)


def hidden_of(llama, stream):
    return forward_jit(llama, *stream, config=MODEL, history=HISTORY)


def extended(llama, stream):
    tokens, meta = stream
    cache = init_cache(MODEL, 2, LENGTH, jnp.float32)
    lengths = jnp.full(2, LENGTH, jnp.int32)
    policy = unstack_layers(llama)
    return extend_jit(
        policy, cache, tokens, meta, lengths, config=MODEL, history=HISTORY
    )[0]


@pytest.mark.parametrize("run", [hidden_of, extended])
def test_new_adapters_change_no_bit(llama, stream, run):
    bare = replace_lora(llama, None)
    dataclasses.replace(llama.layers)  # construction, unlike tree maps, checks shapes
    np.testing.assert_array_equal(run(llama, stream), run(bare, stream))


@pytest.mark.parametrize("run", [hidden_of, extended])
def test_adapters_compute_what_merged_weights_do(llama, stream, run):
    own = lively(llama)
    bare, real = run(replace_lora(own, None), stream), stream[1].episode != 0
    assert jnp.abs(run(own, stream) - bare)[real].max() > 0.1
    expected = run(merged(own), stream)
    np.testing.assert_allclose(run(own, stream)[real], expected[real], atol=2e-5)


def test_gradients_are_those_through_merged_weights(llama, stream):
    own = lively(llama)
    weight = jax.random.normal(jax.random.key(1), (2, LENGTH, MODEL.width))

    def loss(lora, merge):
        adapted = replace_lora(own, lora)
        hidden = forward(merge(adapted), *stream, config=MODEL, history=HISTORY)
        return jnp.sum(weight * hidden) / LENGTH

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    ours, expected = grad(lora_of(own), lambda x: x), grad(lora_of(own), merged)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert jnp.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("rslora", "scale"), [(False, 64 / 16), (True, 64 / np.sqrt(16))]
)
def test_the_scale_is_that_of_the_paper(rslora, scale):
    assert LoraConfig(rank=16, alpha=64.0, rslora=rslora).scale == pytest.approx(scale)


def test_only_targets_have_adapters_of_this_rank():
    lora = LoraConfig(rank=4, targets=("query", "attention_out"))
    config = dataclasses.replace(MODEL, lora=lora)
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config, TINY_VOCAB))
    assert params == abstract_tensors(agent_specs(config, TINY_VOCAB))
    own = lora_of(params.llama)
    assert own.keys() == {"query", "attention_out"}
    depth, width = config.layers, config.width
    heads, head_dim = config.heads, config.head_dim
    assert own["query"].a.shape == (depth, width, 4)
    assert own["query"].b.shape == (depth, 4, heads, head_dim)
    assert own["attention_out"].a.shape == (depth, heads, head_dim, 4)
    assert own["attention_out"].b.shape == (depth, 4, width)


@pytest.mark.parametrize("targets", [(), ("query", "query")])
def test_targets_that_make_no_sense_are_refused(targets):
    with pytest.raises(ValueError, match="name at least one, each once"):
        LoraConfig(rank=4, targets=targets)


def leaf_names(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(tree)}


def test_with_adapters_only_these_and_the_value_head_learn():
    params = init_params(jax.random.key(0), MODEL, TINY_VOCAB)
    trained, frozen = split_trained(params)
    assert all(".lora" in n or ".value" in n for n in leaf_names(trained))
    assert leaf_names(trained) | leaf_names(frozen) == leaf_names(params)
    assert not leaf_names(trained) & leaf_names(frozen)
    whole = join(trained, frozen)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    assert all(
        a is b
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(params), strict=True)
    )


def test_each_llama_of_an_agent_learns_in_its_own_way():
    critic = dataclasses.replace(TINY_MODEL, width=16)
    specs = agent_specs(MODEL, TINY_VOCAB, critic)
    trained, frozen = split_trained(specs)
    assert not leaf_names(frozen.critic)
    assert leaf_names(trained.critic) == leaf_names(specs.critic)
    assert specs.value.hidden.shape == (16, 16)
    alone = agent_specs(TINY_MODEL, TINY_VOCAB)
    assert not leaf_names(split_trained(alone)[1])
    assert join(alone, None) is alone
