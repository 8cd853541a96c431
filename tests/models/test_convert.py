import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.schema import ModelConfig
from jaxplan.models.attention import attend_causally, rotation_at
from jaxplan.models.cache import extend, init_cache
from jaxplan.models.convert import (
    load_hf_llama,
    load_value_head,
    save_hf_llama,
    save_value_head,
)
from jaxplan.models.heads import lm_logits
from jaxplan.models.llama import forward, layer_step, rms_norm
from jaxplan.models.params import init_params, llama_specs, unstack_layers
from jaxplan.models.visibility import PADDING_EPISODE, visible
from tests.fakes import TINY_MODEL, TINY_VOCAB, plain_meta
from tests.models.llama_reference import CASES, unpack_golden, write_reference

REPOSITORY = Path(__file__).resolve().parents[2]
BIASED = dataclasses.replace(TINY_MODEL, attention_bias=True, mlp_bias=True)

forward_jit = jax.jit(forward, static_argnames=("config", "history"))
extend_jit = jax.jit(extend, static_argnums=(5, 6))
logits_jit = jax.jit(lm_logits)


@partial(jax.jit, static_argnames="config")
def one_layer(x, layer, meta, config):
    mask = visible(meta, meta, 1)

    def attention(query, key, value):
        return attend_causally(query, key.swapaxes(1, 2), value.swapaxes(1, 2), mask)

    return layer_step(x, layer, rotation_at(meta.position, config), attention, config)


def load(folder):
    config = ModelConfig(**load_hf_shape(folder))
    return config, load_hf_llama(folder, config, config.vocab_size)


def parity(folder, reference, ways) -> dict[str, float]:
    """Largest differences: of a layer's output, of the logits of each way to them."""
    config, params = load(folder)
    tokens, lengths = jnp.asarray(reference["tokens"]), reference["lengths"]
    meta = plain_meta(*tokens.shape)
    real = np.arange(tokens.shape[1])[None] < lengths[:, None]
    episode = jnp.where(real, meta.episode, PADDING_EPISODE)
    meta = dataclasses.replace(meta, episode=episode)
    layers = []
    for depth, layer in enumerate(unstack_layers(params).layers):
        x = one_layer(jnp.asarray(reference["hidden"][depth]), layer, meta, config)
        if depth == config.layers - 1:
            x = rms_norm(x, params.final_norm, config.norm_eps)
        layers.append(np.abs(x - reference["hidden"][depth + 1])[real].max())
    logits = {
        way.__name__: logits_jit(params, way(params, tokens, meta, lengths, config))
        for way in ways
    }
    return {"layer": max(layers)} | {
        way: np.abs(values - reference["logits"])[real].max()
        for way, values in logits.items()
    }


def at_once(params, tokens, meta, _, config):
    return forward_jit(params, tokens, meta, config=config, history=1)


def cached(params, tokens, meta, lengths, config):
    cache = init_cache(config, *tokens.shape, jnp.float32)
    params, lengths = unstack_layers(params), jnp.asarray(lengths)
    return extend_jit(params, cache, tokens, meta, lengths, config, 1)[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_transformers_computed(tmp_path, case):
    reference = unpack_golden(case, tmp_path)
    assert np.abs(reference["logits"]).max() > 1  # or a difference would not show
    ways = (at_once, cached) if case in ("llama3", "both biases") else (at_once,)
    for what, difference in parity(tmp_path, reference, ways).items():
        assert difference < 1e-4, what


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
# transformers warns about its own deprecations; they are not ours to fail on.
@pytest.mark.filterwarnings("ignore")
def test_logits_are_those_transformers_computes(tmp_path, case, record_property):
    pytest.importorskip("torch")
    reference = write_reference(tmp_path, seed=1, **CASES[case])
    for what, difference in parity(tmp_path, reference, (at_once, cached)).items():
        record_property(what, f"{difference:.1e}")  # for the table of a report
        assert difference < 1e-4, what


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [TINY_MODEL, BIASED], ids=["plain", "biased"])
def test_transformers_reads_what_we_write(tmp_path, config):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    params = random_params(config)
    save_hf_llama(tmp_path, config, params, shard_bytes=20_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    tokens = np.arange(40, dtype=np.int32).reshape(2, 20)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens.astype(np.int64))).logits.numpy()
    meta = plain_meta(2, 20)
    hidden = forward_jit(params, jnp.asarray(tokens), meta, config=config, history=1)
    np.testing.assert_allclose(logits_jit(params, hidden), expected, atol=1e-4)


def random_params(config):
    """Weights no two of which are alike, biases and norms included."""
    rng = np.random.default_rng(0)

    def draw(spec):
        return jnp.asarray(0.2 * rng.normal(size=spec.shape), jnp.float32)

    return jax.tree.map(draw, llama_specs(config, TINY_VOCAB))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shard_bytes", [2**30, 9_000], ids=["one file", "shards"])
def test_a_saved_llama_loads_as_it_was(tmp_path, tied, shard_bytes):
    config = dataclasses.replace(BIASED, tie_embeddings=tied)
    params = random_params(config)
    save_hf_llama(tmp_path, config, params, shard_bytes=shard_bytes)
    loaded_config, loaded = load(tmp_path)
    assert loaded_config == dataclasses.replace(config, vocab_size=TINY_VOCAB)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes == 9_000)
    for file in files:
        sizes = [tensor.nbytes for tensor in load_file(file).values()]
        assert sum(sizes) <= shard_bytes or len(sizes) == 1


def test_maps_are_transposed_even_if_they_are_square(tmp_path):
    config = dataclasses.replace(TINY_MODEL, ffn_width=TINY_MODEL.width)
    params = random_params(config)
    save_hf_llama(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    up = tensors["model.layers.1.mlp.up_proj.weight"]
    np.testing.assert_array_equal(up, np.asarray(params.layers.up[1]).T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_was_exported_imports_and_exports_bit_by_bit(tmp_path, dtype):
    first, second = tmp_path / "first", tmp_path / "second"
    save_hf_llama(first, BIASED, random_params(BIASED), dtype)
    config, params = load(first)
    assert params.embed.dtype == jnp.float32
    save_hf_llama(second, config, params, dtype)
    for file in first.iterdir():
        assert file.read_bytes() == (second / file.name).read_bytes()
    for tensor in load_file(first / "model.safetensors").values():
        assert tensor.dtype == jnp.dtype(dtype)


def test_a_weight_that_the_dtype_cannot_hold_is_named(tmp_path):
    params = random_params(TINY_MODEL)
    params = dataclasses.replace(params, embed=params.embed.at[3, 4].set(1e5))
    save_hf_llama(tmp_path, TINY_MODEL, params, "bfloat16")
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: .* as float16"):
        save_hf_llama(tmp_path, TINY_MODEL, params, "float16")


def test_a_llama_is_read_onto_a_mesh(tmp_path):
    config = dataclasses.replace(BIASED, tie_embeddings=False)
    params = random_params(config)
    save_hf_llama(tmp_path, config, params)
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "model"))
    rules = {"width": "fsdp", "heads": "model", "kv_heads": "model", "ffn": "model"}
    shardings = jax.tree.map(
        lambda spec: NamedSharding(
            mesh, PartitionSpec(*[rules.get(axis) for axis in spec.logical_axes])
        ),
        llama_specs(config, TINY_VOCAB),
    )
    loaded = load_hf_llama(tmp_path, config, TINY_VOCAB, shardings)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    for tensor, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(shardings), strict=True
    ):
        assert tensor.sharding.is_equivalent_to(sharding, tensor.ndim)
    gate = loaded.layers.gate.addressable_shards[0].data
    assert gate.size == loaded.layers.gate.size // 8


def test_a_value_head_travels_beside_a_llama(tmp_path):
    value = init_params(jax.random.key(2), TINY_MODEL, TINY_VOCAB).value
    assert load_value_head(tmp_path, TINY_MODEL) is None
    save_value_head(tmp_path, value)
    jax.tree.map(
        np.testing.assert_array_equal, value, load_value_head(tmp_path, TINY_MODEL)
    )
    wider = dataclasses.replace(TINY_MODEL, width=64)
    with pytest.raises(ValueError, match=r"hidden: shape \(32, 32\), expected \(64"):
        load_value_head(tmp_path, wider)


IMPORT_A_LARGE_ONE = """
import resource, sys
from pathlib import Path
import jax
from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.schema import ModelConfig
from jaxplan.models.convert import load_hf_llama

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

config = ModelConfig(**load_hf_shape(sys.argv[1]))
jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
before = peak()
params = jax.block_until_ready(load_hf_llama(sys.argv[1], config, config.vocab_size))
print(peak() - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
def test_the_host_holds_little_more_than_the_largest_tensor(tmp_path):
    """On the CPU what is on the device is in the process too, so it is subtracted."""
    config = ModelConfig(
        width=768, layers=12, heads=12, kv_heads=12, head_dim=64, ffn_width=3072
    )
    specs = llama_specs(config, 8_000)
    zeros = jax.tree.map(lambda spec: jnp.zeros(spec.shape, spec.dtype), specs)
    save_hf_llama(tmp_path, config, zeros, "bfloat16", shard_bytes=2**26)
    on_disk = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_A_LARGE_ONE, str(tmp_path)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 100 * 2**20 < on_disk / 2
