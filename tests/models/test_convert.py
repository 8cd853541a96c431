import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxplan.config.schema import ModelConfig, RopeScalingConfig
from jaxplan.models.cache import extend, init_cache
from jaxplan.models.convert import (
    load_hf_llama,
    read_hf_config,
    save_hf_llama,
    write_hf_config,
)
from jaxplan.models.heads import lm_logits
from jaxplan.models.llama import forward
from jaxplan.models.params import init_params, unstack_layers
from tests.fakes import TINY_MODEL, TINY_VOCAB, plain_meta
from tests.models.llama_reference import LLAMA3, unpack_golden, write_reference

forward_jit = jax.jit(forward, static_argnames=("config", "history"))
logits_jit = jax.jit(lm_logits)


def check_parity(folder, reference):
    """Compare layer by layer, then the logits, then the logits of the cached way."""
    config, _, params = load_hf_llama(folder)
    tokens = jnp.asarray(reference["tokens"])
    meta = plain_meta(*tokens.shape)
    unit_norm = dataclasses.replace(params, final_norm=jnp.ones(config.width))
    for depth in range(config.layers):
        cut = jax.tree.map(lambda tensor, depth=depth: tensor[:depth], params.layers)
        shallow = dataclasses.replace(unit_norm, layers=cut)
        hidden = forward_jit(shallow, tokens, meta, config=config, history=1)
        stream = reference["hidden"][depth]
        rms = np.sqrt((stream**2).mean(axis=-1, keepdims=True) + config.norm_eps)
        np.testing.assert_allclose(hidden, stream / rms, atol=1e-4)
    hidden = forward_jit(params, tokens, meta, config=config, history=1)
    np.testing.assert_allclose(hidden, reference["hidden"][-1], atol=1e-4)
    np.testing.assert_allclose(
        logits_jit(params, hidden), reference["logits"], atol=1e-4
    )
    hidden, _ = jax.jit(extend, static_argnums=(5, 6))(
        unstack_layers(params),
        init_cache(config, *tokens.shape, jnp.float32),
        tokens,
        meta,
        jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32),
        config,
        1,
    )
    np.testing.assert_allclose(
        logits_jit(params, hidden), reference["logits"], atol=1e-4
    )


def test_logits_are_those_transformers_computed(tmp_path):
    check_parity(tmp_path, unpack_golden(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("scaled", [True, False], ids=["llama3", "plain"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
# transformers warns about its own deprecations; they are not ours to fail on.
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_transformers_computes(tmp_path, kv_heads, tied, scaled):
    pytest.importorskip("torch")
    rope = {"rope_theta": 5_000.0, **(LLAMA3 if scaled else {"rope_type": "default"})}
    reference = write_reference(
        tmp_path,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters=rope,
    )
    check_parity(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_what_we_write(tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import LlamaForCausalLM

    params = init_params(jax.random.key(0), TINY_MODEL, TINY_VOCAB).llama
    save_hf_llama(tmp_path, TINY_MODEL, params)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    meta = plain_meta(2, 20)
    hidden = forward_jit(
        params, jnp.asarray(tokens), meta, config=TINY_MODEL, history=1
    )
    np.testing.assert_allclose(logits_jit(params, hidden), expected, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_llama_loads_as_it_was(tmp_path, tied):
    config = dataclasses.replace(TINY_MODEL, tie_embeddings=tied)
    params = init_params(jax.random.key(0), config, TINY_VOCAB).llama
    save_hf_llama(tmp_path, config, params)
    loaded_config, vocab_size, loaded = load_hf_llama(tmp_path)
    assert (loaded_config, vocab_size) == (config, TINY_VOCAB)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)


def test_all_misfits_are_listed_at_once(tmp_path):
    params = init_params(jax.random.key(0), TINY_MODEL, TINY_VOCAB).llama
    save_hf_llama(tmp_path, TINY_MODEL, params)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)
    tensors["model.norm.weight"] = np.zeros(31, np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="do not fit") as error:
        load_hf_llama(tmp_path)
    for line in (
        "model.layers.1.mlp.up_proj.weight: missing, expected (48, 32)",
        "model.layers.0.self_attn.q_proj.bias: not a tensor of this Llama",
        "model.norm.weight: shape (31,), expected (32,)",
    ):
        assert line in str(error.value)


def test_both_spellings_of_rotary_settings_are_read():
    scaling = RopeScalingConfig(factor=8.0, original_max_position_embeddings=32)
    config = ModelConfig(rope_theta=5e5, rope_scaling=scaling)
    written = write_hf_config(config, 100)
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}
    for spelling in (old, new, json.loads(json.dumps(written))):
        assert read_hf_config(spelling) == (config, 100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "qwen2"),
        ("attention_bias", True),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "yarn"}),
    ],
)
def test_what_this_llama_lacks_is_refused(name, value):
    hf = {**write_hf_config(TINY_MODEL, 10), "rope_scaling": None, name: value}
    with pytest.raises(ValueError, match="only"):
        read_hf_config(hf)
