"""Llamas from and to Hugging Face folders: ``config.json`` and safetensors.

One table says what each tensor is called there and how it lies here; shapes come from
the same specs that init uses.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from jaxplan.config.schema import ModelConfig, RopeScalingConfig
from jaxplan.core.specs import TensorSpec
from jaxplan.models.params import LayerParams, LlamaParams, llama_specs


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
    Entry("self_attn.k_proj.weight", "key", inputs=1),
    Entry("self_attn.v_proj.weight", "value", inputs=1),
    Entry("self_attn.o_proj.weight", "attention_out", inputs=2),
    Entry("post_attention_layernorm.weight", "ffn_norm"),
    Entry("mlp.gate_proj.weight", "gate", inputs=1),
    Entry("mlp.up_proj.weight", "up", inputs=1),
    Entry("mlp.down_proj.weight", "down", inputs=1),
)


def load_hf_llama(folder: Path | str) -> tuple[ModelConfig, int, LlamaParams]:
    """Read a Llama; all its files are checked before anything is built.

    Returns:
        Its configuration (compute dtype and remat are the defaults), the size of its
        vocabulary, and its weights as float32 master copy.

    Raises:
        ValueError: the folder holds no Llama that this code computes, or tensors are
            missing, superfluous or misshapen; all of them are listed.
    """
    folder = Path(folder)
    hf_config = json.loads((folder / "config.json").read_text())
    config, vocab_size = read_hf_config(hf_config)
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    specs = llama_specs(config, vocab_size)
    _check_tensors(folder, _expected_shapes(specs), tensors)

    def ours(entry: Entry, name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors[name].astype(np.float32)
        return tensor.T.reshape(shape) if entry.inputs else tensor

    layers = {
        entry.ours: jnp.stack(
            [
                ours(entry, _layer_name(index, entry), spec.shape[1:])
                for index in range(config.layers)
            ]
        )
        for entry, spec in _layer_entries(specs)
    }
    top = {
        entry.ours: jnp.asarray(ours(entry, entry.theirs, spec.shape))
        for entry, spec in _top_entries(specs)
    }
    params = LlamaParams(
        embed=top["embed"],
        layers=LayerParams(**layers),
        final_norm=top["final_norm"],
        lm_head=top.get("lm_head"),
    )
    return config, vocab_size, params


def save_hf_llama(folder: Path | str, config: ModelConfig, params: LlamaParams) -> None:
    """Write a Llama with stacked layers as a folder that transformers reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = params.embed.shape[0]
    specs = llama_specs(config, vocab_size)
    tensors = {}
    for entry, spec in _top_entries(specs):
        tensors[entry.theirs] = _theirs(entry, getattr(params, entry.ours), spec.shape)
    for entry, spec in _layer_entries(specs):
        stacked = getattr(params.layers, entry.ours)
        for index in range(config.layers):
            tensors[_layer_name(index, entry)] = _theirs(
                entry, stacked[index], spec.shape[1:]
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(write_hf_config(config, vocab_size), indent=2)
    (folder / "config.json").write_text(text + "\n")


def read_hf_config(hf: Mapping[str, Any]) -> tuple[ModelConfig, int]:
    """Translate a Llama's ``config.json``; return it with the vocabulary's size.

    Raises:
        ValueError: it asks for something that this Llama does not have.
    """
    wanted = {
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }
    for name, value in wanted.items():
        given = hf.get(name, value)
        if given != value:
            raise ValueError(f"config.json: {name}={given!r}; only {value!r} is known")
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters.
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    config = ModelConfig(
        width=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        ffn_width=hf["intermediate_size"],
        rope_theta=rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0,
        rope_scaling=_read_rope_scaling(rope),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )
    return config, hf["vocab_size"]


def _read_rope_scaling(rope: Mapping[str, Any]) -> RopeScalingConfig | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(
            f"config.json: rope_type={kind!r}; only 'default' and 'llama3' are known"
        )
    return RopeScalingConfig(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_position_embeddings=rope["original_max_position_embeddings"],
    )


def write_hf_config(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """Describe a Llama in the words of ``config.json``, old and new spelling."""
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_width,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "vocab_size": vocab_size,
        "torch_dtype": "float32",
        "rope_theta": config.rope_theta,
    }
    if config.rope_scaling is None:
        rope = {"rope_type": "default"}
    else:
        scaling = config.rope_scaling
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": (
                scaling.original_max_position_embeddings
            ),
        }
        hf["rope_scaling"] = rope
        hf["max_position_embeddings"] = int(
            scaling.factor * scaling.original_max_position_embeddings
        )
    return {**hf, "rope_parameters": {"rope_theta": config.rope_theta, **rope}}


def _top_entries(specs: LlamaParams) -> list[tuple[Entry, TensorSpec]]:
    pairs = [(entry, getattr(specs, entry.ours)) for entry in TOP]
    return [(entry, spec) for entry, spec in pairs if spec is not None]


def _layer_entries(specs: LlamaParams) -> list[tuple[Entry, TensorSpec]]:
    return [(entry, getattr(specs.layers, entry.ours)) for entry in LAYER]


def _layer_name(index: int, entry: Entry) -> str:
    return f"model.layers.{index}.{entry.theirs}"


def _their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    if entry.inputs is None:
        return shape
    return math.prod(shape[entry.inputs :]), math.prod(shape[: entry.inputs])


def _theirs(entry: Entry, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    tensor = np.asarray(tensor)
    if entry.inputs is None:
        return tensor
    return np.ascontiguousarray(tensor.reshape(_their_shape(entry, shape)[::-1]).T)


def _expected_shapes(specs: LlamaParams) -> dict[str, tuple[int, ...]]:
    shapes = {
        entry.theirs: _their_shape(entry, spec.shape)
        for entry, spec in _top_entries(specs)
    }
    for entry, spec in _layer_entries(specs):
        for index in range(spec.shape[0]):
            name = _layer_name(index, entry)
            shapes[name] = _their_shape(entry, spec.shape[1:])
    return shapes


def _check_tensors(folder, expected, tensors) -> None:
    missing = sorted(expected.keys() - tensors.keys())
    extra = sorted(tensors.keys() - expected.keys())
    problems = [f"{name}: missing, expected {expected[name]}" for name in missing]
    problems += [f"{name}: not a tensor of this Llama" for name in extra]
    for name in sorted(expected.keys() & tensors.keys()):
        if tensors[name].shape != expected[name]:
            problems.append(
                f"{name}: shape {tensors[name].shape}, expected {expected[name]}"
            )
    if problems:
        raise ValueError(
            f"{folder}: the tensors do not fit config.json:\n  " + "\n  ".join(problems)
        )
