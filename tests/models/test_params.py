import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.core.specs import abstract_tensors
from jaxplan.models.params import (
    AgentParams,
    agent_specs,
    cast_params,
    init_params,
    unstack_layers,
)
from tests.fakes import TINY_MODEL, TINY_VOCAB


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_declared_is_what_is_drawn(tied, biased):
    config = dataclasses.replace(
        TINY_MODEL, tie_embeddings=tied, attention_bias=biased, mlp_bias=biased
    )
    params = init_params(jax.random.key(0), config, TINY_VOCAB)
    specs = agent_specs(config, TINY_VOCAB)
    assert isinstance(params, AgentParams)
    assert jax.tree.structure(params) == jax.tree.structure(specs)
    assert jax.eval_shape(lambda: params) == abstract_tensors(specs)
    assert (params.llama.lm_head is None) == tied
    assert (params.llama.layers.query_bias is None) != biased
    assert (params.llama.layers.down_bias is None) != biased
    # Construction, unlike tree maps, checks shapes in the tests.
    dataclasses.replace(params.llama.layers)
    dataclasses.replace(params.llama)
    dataclasses.replace(params.value)


def test_a_layer_keeps_the_scale_of_what_goes_through_it():
    config = dataclasses.replace(TINY_MODEL, width=256, ffn_width=512)
    layers = init_params(jax.random.key(1), config, TINY_VOCAB).llama.layers
    x = jax.random.normal(jax.random.key(2), (64, config.width))
    for weights in (layers.query, layers.key, layers.value, layers.gate, layers.up):
        out = x @ weights[0].reshape(config.width, -1)
        assert 0.9 < out.std() < 1.1


def test_norm_scales_stay_float32_in_the_compute_copy():
    config = dataclasses.replace(TINY_MODEL, compute_dtype="bfloat16")
    params = init_params(jax.random.key(0), config, TINY_VOCAB).llama
    norms = {"attention_norm", "ffn_norm", "final_norm"}
    for form in (params, unstack_layers(params)):
        for path, tensor in jax.tree.leaves_with_path(cast_params(form, config)):
            is_norm = path[-1].name in norms
            assert tensor.dtype == (jnp.float32 if is_norm else jnp.bfloat16), path


def test_unstacking_twice_is_unstacking_once():
    params = unstack_layers(init_params(jax.random.key(0), TINY_MODEL, 9).llama)
    again = unstack_layers(params)
    np.testing.assert_array_equal(params.layers[0].up, again.layers[0].up)
