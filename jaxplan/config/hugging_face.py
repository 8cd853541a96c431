"""A Llama's shape in the words of Hugging Face: ``config.json``, read and written.

And that of its adapters in the words of PEFT: ``adapter_config.json``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxplan.config.schema import (
    LoraConfig,
    ModelConfig,
    RopeScalingConfig,
)

ADAPTER = "adapter"  # folder of the adapters, in that of the Llama
PEFT_CONFIG = "adapter_config.json"

# What this Llama computes; an absent key means the same.
_ONLY = {"model_type": "llama", "hidden_act": "silu", "quantization_config": None}
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn_width",
}
_ROPE_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# What these adapters are, in the words of PEFT; an absent or empty key means the same.
_ONLY_LORA = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layer_replication": None,
    "exclude_modules": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
_TARGETS = {
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "attention_out": "o_proj",
    "gate": "gate_proj",
    "up": "up_proj",
    "down": "down_proj",
}


def load_hf_shape(folder: Path | str) -> dict[str, Any]:
    """Read the shape of the Llama in a folder, and of the adapters in it, if any.

    Returns:
        As ``read_hf_shape``, and ``lora`` where there are adapters.

    Raises:
        ValueError: there is no ``config.json``, or not that of a Llama, or the adapters
            are of another kind.
    """
    path = Path(folder).expanduser()
    shape = read_hf_shape(_load_json(path / "config.json"))
    adapter = path / ADAPTER / PEFT_CONFIG
    if adapter.exists():
        shape["lora"] = read_peft_config(_load_json(adapter))
    return shape


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{file}: no such file; give a Hugging Face folder on this machine, "
            "nothing is downloaded"
        ) from None
    except ValueError as error:  # neither UTF-8 nor JSON
        raise ValueError(f"{file}: not JSON: {error}") from error


def read_hf_shape(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a Llama's ``config.json``.

    Returns:
        The keys of ``ModelConfig`` that it settles, all that shape the weights or
        what is computed from them.

    Raises:
        ValueError: it asks for what this Llama does not have; all of it is listed.
    """
    # transformers 5 moved rope_theta and rope_scaling into rope_parameters, and where
    # both stand, it takes the older one.
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    problems = [
        f"{name}={hf[name]!r}; only {value!r} is known"
        for name, value in _ONLY.items()
        if hf.get(name, value) != value
    ]
    problems += [f"{name} is missing" for name in _SIZES if not hf.get(name)]
    problems += _rope_problems(rope)
    if problems:
        raise ValueError("config.json: " + "\nconfig.json: ".join(problems))
    heads = hf["num_attention_heads"]
    scaled = _rope_kind(rope) == "llama3"
    return {ours: hf[theirs] for theirs, ours in _SIZES.items()} | {
        "kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "rope_theta": rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0,
        "rope_scaling": RopeScalingConfig(
            **{name: rope[name] for name in _ROPE_SCALING}
        )
        if scaled
        else None,
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", False),
        "attention_bias": hf.get("attention_bias", False),
        "mlp_bias": hf.get("mlp_bias", False),
    }


def write_hf_config(
    config: ModelConfig,
    vocab_size: int,
    dtype: str = "float32",
    about: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a Llama in the words of ``config.json``, old and new spelling.

    Args:
        config: its shape.
        vocab_size: rows of its embedding.
        dtype: of its tensors.
        about: other keys, such as ``eos_token_id``; the shape wins over them.
    """
    hf = {
        **(about or {}),
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
    }
    hf |= {theirs: getattr(config, ours) for theirs, ours in _SIZES.items()}
    hf["vocab_size"] = vocab_size
    rope: dict[str, Any] = {"rope_type": "default"}
    scaling = config.rope_scaling
    if scaling is not None:
        rope = {name: getattr(scaling, name) for name in _ROPE_SCALING}
        rope["rope_type"] = "llama3"
        hf["rope_scaling"] = rope
        longest = int(scaling.factor * scaling.original_max_position_embeddings)
        hf.setdefault("max_position_embeddings", longest)
    return {**hf, "rope_parameters": {"rope_theta": config.rope_theta, **rope}}


def read_peft_config(peft: Mapping[str, Any]) -> LoraConfig:
    """Translate an ``adapter_config.json``.

    Raises:
        ValueError: these are other adapters than those known here; all of it is listed.
    """
    problems = [
        f"{name}={peft[name]!r}; only {value!r} is known"
        for name, value in _ONLY_LORA.items()
        if (peft.get(name) or value) != value
    ]
    given = peft.get("target_modules") or ()
    named: Any = _TARGETS.values() if given == "all-linear" else given
    known = list(_TARGETS.values())
    if isinstance(named, str) or not named or set(named) - set(known):
        problems.append(f"target_modules={given!r}; known are {', '.join(known)}")
    problems += [
        f"{name} is missing" for name in ("r", "lora_alpha") if not peft.get(name)
    ]
    if problems:
        raise ValueError(f"{PEFT_CONFIG}: " + f"\n{PEFT_CONFIG}: ".join(problems))
    targets: Any = tuple(ours for ours in _TARGETS if _TARGETS[ours] in named)
    return LoraConfig(
        rank=peft["r"],
        alpha=peft["lora_alpha"],
        rslora=peft.get("use_rslora") or False,
        targets=targets,
    )


def write_peft_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """Describe adapters in the words of ``adapter_config.json``.

    Args:
        lora: rank, scale and targets.
        base: where the Llama is that they belong to.
    """
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "bias": "none",
        "target_modules": [_TARGETS[name] for name in lora.targets],
        "inference_mode": True,
    }


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope_problems(rope: Mapping[str, Any]) -> list[str]:
    kind = _rope_kind(rope)
    if kind not in ("default", "llama3"):
        return [f"rope_type={kind!r}; only 'default' and 'llama3' are known"]
    problems = []
    if rope.get("partial_rotary_factor", 1) != 1:
        problems.append("partial_rotary_factor is set; only whole heads are rotated")
    if kind == "llama3":
        absent = [name for name in _ROPE_SCALING if name not in rope]
        problems += [f"rope_type 'llama3' without {name}" for name in absent]
    return problems
