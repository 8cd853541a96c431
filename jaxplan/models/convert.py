"""Llamas from and to Hugging Face folders, tensor by tensor.

One table says what each tensor is called there and how it lies here; shapes come from
the same specs that init uses. The host never holds more than a tensor or two: what is
stacked here is filled layer by layer where it stays, on the devices.
"""

import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from safetensors.numpy import save_file

from jaxplan.config.hugging_face import write_hf_config
from jaxplan.config.schema import ModelConfig
from jaxplan.core.specs import TensorSpec
from jaxplan.models.params import (
    LayerParams,
    LlamaParams,
    ValueParams,
    llama_specs,
    value_specs,
)
from jaxplan.models.tensor_files import (
    Shape,
    check_tensors,
    read_tensor,
    write_shards,
)

VALUE_HEAD = "value_head.safetensors"  # ours; it holds the fields of ValueParams
SHARD_BYTES = 4 * 2**30


class Entry(NamedTuple):
    """Where a tensor is found on both sides.

    A linear map is stored there as [outputs, inputs], here as [*inputs, *outputs].
    """

    theirs: str
    ours: str
    inputs: int | None = None  # leading input axes of ours; None: the same layout


TOP = (
    Entry("model.embed_tokens.weight", "embed"),
    Entry("model.norm.weight", "final_norm"),
    Entry("lm_head.weight", "lm_head", inputs=1),
)
LAYER = (
    Entry("input_layernorm.weight", "attention_norm"),
    Entry("self_attn.q_proj.weight", "query", inputs=1),
    Entry("self_attn.q_proj.bias", "query_bias", inputs=0),
    Entry("self_attn.k_proj.weight", "key", inputs=1),
    Entry("self_attn.k_proj.bias", "key_bias", inputs=0),
    Entry("self_attn.v_proj.weight", "value", inputs=1),
    Entry("self_attn.v_proj.bias", "value_bias", inputs=0),
    Entry("self_attn.o_proj.weight", "attention_out", inputs=2),
    Entry("self_attn.o_proj.bias", "attention_out_bias", inputs=0),
    Entry("post_attention_layernorm.weight", "ffn_norm"),
    Entry("mlp.gate_proj.weight", "gate", inputs=1),
    Entry("mlp.gate_proj.bias", "gate_bias", inputs=0),
    Entry("mlp.up_proj.weight", "up", inputs=1),
    Entry("mlp.up_proj.bias", "up_bias", inputs=0),
    Entry("mlp.down_proj.weight", "down", inputs=1),
    Entry("mlp.down_proj.bias", "down_bias", inputs=0),
)


def check_hf_llama(
    folder: Path | str, config: ModelConfig, vocab_size: int
) -> dict[str, Path]:
    """Compare the tensors in a folder with those of a Llama; only headers are read.

    Returns:
        The file that holds each tensor.

    Raises:
        ValueError: they differ; everything is listed.
    """
    specs = llama_specs(config, vocab_size)
    return check_tensors(Path(folder).expanduser(), _their_shapes(specs))


def load_hf_llama(
    folder: Path | str,
    config: ModelConfig,
    vocab_size: int,
    shardings: LlamaParams | None = None,
) -> LlamaParams:
    """Read a Llama onto the devices, in the dtype of the specs, layers stacked.

    Args:
        folder: with bfloat16, float16 or float32 tensors, in one file or several.
        config: its shape, as ``load_hf_shape`` reads it.
        vocab_size: rows of the embedding.
        shardings: a ``LlamaParams`` with a sharding at each leaf; None puts all on the
            first device.

    Raises:
        ValueError: the tensors are not those of this Llama; everything is listed
            before any is read.
    """
    files = check_hf_llama(folder, config, vocab_size)
    specs = llama_specs(config, vocab_size)
    if shardings is None:
        first = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: first, specs)

    def place(entry: Entry, name: str, shape: Shape, sharding: Sharding) -> jax.Array:
        tensor = read_tensor(files[name], name)
        ours = tensor if entry.inputs is None else tensor.T.reshape(shape)
        return jax.make_array_from_callback(shape, sharding, lambda index: ours[index])

    def top(entry: Entry, spec: TensorSpec) -> jax.Array:
        sharding = getattr(shardings, entry.ours)
        return place(entry, entry.theirs, spec.shape, sharding).astype(spec.dtype)

    def stack(entry: Entry, spec: TensorSpec) -> jax.Array:
        sharding = getattr(shardings.layers, entry.ours)
        layers = jnp.zeros(spec.shape, spec.dtype, device=sharding)
        for index in range(config.layers):
            name, shape = _layer_name(index, entry), spec.shape[1:]
            layer = place(entry, name, shape, _of_one_layer(sharding))
            # Waiting keeps the host from reading ahead of the devices.
            layers = jax.block_until_ready(_put_layer(layers, layer, index))
        return layers

    layers: dict[str, Any] = {
        entry.ours: stack(entry, spec) for entry, spec in _layer_entries(specs)
    }
    others = {entry.ours: top(entry, spec) for entry, spec in _top_entries(specs)}
    return LlamaParams(
        embed=others["embed"],
        layers=LayerParams(**layers),
        final_norm=others["final_norm"],
        lm_head=others.get("lm_head"),
    )


def save_hf_llama(
    folder: Path | str,
    config: ModelConfig,
    params: LlamaParams,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a Llama with stacked layers as a folder that transformers reads.

    Args:
        folder: where to; made if missing.
        config: its shape.
        params: its weights, on this process's devices.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        shard_bytes: the largest file.
        about: keys of ``config.json`` that do not shape the weights.

    Raises:
        ValueError: a weight is not finite, or not in this dtype.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = params.embed.shape[0]
    specs = llama_specs(config, vocab_size)
    tensors = _their_tensors(specs, params, dtype)
    write_shards(folder, _their_shapes(specs), tensors, dtype, shard_bytes)
    hf = write_hf_config(config, vocab_size, dtype, about or {})
    (folder / "config.json").write_text(json.dumps(hf, indent=2) + "\n")


def load_value_head(folder: Path | str, config: ModelConfig) -> ValueParams | None:
    """Read the value head that lies beside a Llama; None where none does.

    Raises:
        ValueError: its tensors do not fit the Llama.
    """
    file = Path(folder).expanduser() / VALUE_HEAD
    if not file.exists():
        return None
    specs = value_specs(config)
    shapes = {name: spec.shape for name, spec in vars(specs).items()}
    check_tensors(file.parent, shapes, file.name)
    return ValueParams(
        **{name: jnp.asarray(read_tensor(file, name), jnp.float32) for name in shapes}
    )


def save_value_head(folder: Path | str, params: ValueParams) -> None:
    """Write a value head beside a Llama, in float32."""
    tensors = {name: np.asarray(tensor) for name, tensor in vars(params).items()}
    save_file(tensors, Path(folder) / VALUE_HEAD)


@partial(jax.jit, donate_argnums=0)
def _put_layer(layers, layer, index):
    """Write one layer where it belongs, in place."""
    return lax.dynamic_update_index_in_dim(layers, layer.astype(layers.dtype), index, 0)


def _of_one_layer(sharding: Sharding) -> Sharding:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return sharding


def _top_entries(specs: LlamaParams) -> list[tuple[Entry, TensorSpec]]:
    pairs = [(entry, getattr(specs, entry.ours)) for entry in TOP]
    return [(entry, spec) for entry, spec in pairs if spec is not None]


def _layer_entries(specs: LlamaParams) -> list[tuple[Entry, TensorSpec]]:
    pairs = [(entry, getattr(specs.layers, entry.ours)) for entry in LAYER]
    return [(entry, spec) for entry, spec in pairs if spec is not None]


def _layer_name(index: int, entry: Entry) -> str:
    return f"model.layers.{index}.{entry.theirs}"


def _their_shape(entry: Entry, shape: Shape) -> Shape:
    if entry.inputs is None:
        return shape
    outputs = math.prod(shape[entry.inputs :])
    return (outputs, math.prod(shape[: entry.inputs])) if entry.inputs else (outputs,)


def _their_shapes(specs: LlamaParams) -> dict[str, Shape]:
    """Every tensor of theirs, in the order in which it is written."""
    shapes = {
        entry.theirs: _their_shape(entry, spec.shape)
        for entry, spec in _top_entries(specs)
    }
    for entry, spec in _layer_entries(specs):
        for index in range(spec.shape[0]):
            name = _layer_name(index, entry)
            shapes[name] = _their_shape(entry, spec.shape[1:])
    return shapes


def _their_tensors(
    specs: LlamaParams, params: LlamaParams, dtype: str
) -> Iterator[np.ndarray]:
    """Fetch the tensors of ``_their_shapes`` one by one."""

    def fetch(entry: Entry, name: str, tensor: jax.Array) -> np.ndarray:
        shape = _their_shape(entry, tensor.shape)
        transposed = shape[::-1] if entry.inputs is not None else None
        theirs, finite = _as_theirs(tensor, transposed, dtype)
        if not finite:
            raise ValueError(f"{name}: a weight is not finite as {dtype}")
        return np.asarray(theirs)

    for entry, _ in _top_entries(specs):
        yield fetch(entry, entry.theirs, getattr(params, entry.ours))
    for entry, spec in _layer_entries(specs):
        stacked = getattr(params.layers, entry.ours)
        for index in range(spec.shape[0]):
            yield fetch(entry, _layer_name(index, entry), stacked[index])


@partial(jax.jit, static_argnames=("transposed", "dtype"))
def _as_theirs(tensor: jax.Array, transposed: Shape | None, dtype: str):
    theirs = tensor if transposed is None else tensor.reshape(transposed).T
    theirs = theirs.astype(dtype)
    return theirs, jnp.all(jnp.isfinite(theirs))
