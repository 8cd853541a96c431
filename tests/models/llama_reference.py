"""The Llama of transformers as the reference, live or as stored goldens.

A golden holds a tiny model's tensors under their Hugging Face names, its config.json,
token ids, and what transformers computes from them. To make them anew (only where the
cases themselves have to change; the numbers are not ours): install torch and run
``python -m tests.models.llama_reference`` in the repository root.
"""

import json
import tempfile
from pathlib import Path

import ml_dtypes  # noqa: F401 (bfloat16 for numpy)
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

GOLDENS = Path(__file__).parent.parent / "data" / "llama_goldens.safetensors"
OUTPUTS = ("tokens", "lengths", "logits", "hidden")

SIZES = {
    "vocab_size": 33,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / num_attention_heads
    "intermediate_size": 24,
    "initializer_range": 0.4,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BATCH, LENGTH = 2, 40  # past the original 32 positions
LENGTHS = (40, 29)  # the rest of the second stream is padding


def rope(theta: float, scaling: dict | None = None) -> dict:
    return {"rope_theta": theta, **(scaling or {"rope_type": "default"})}


# What differs from SIZES, "dtype" of the file, and "old" spelling of config.json.
CASES = {
    "llama3": {"rope_parameters": rope(1e4, LLAMA3)},
    "plain": {"rope_parameters": rope(1e4), "dtype": "bfloat16"},
    "theta 500000": {
        "rope_parameters": rope(5e5, LLAMA3),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
    "theta 1000": {"rope_parameters": rope(1e3), "tie_word_embeddings": True},
    "1 kv head": {"num_key_value_heads": 1, "rope_parameters": rope(5e3, LLAMA3)},
    "4 kv heads": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "head_dim of the width": {"head_dim": 4, "dtype": "float32"},
    "attention bias": {
        "attention_bias": True,
        "rope_parameters": rope(1e4, LLAMA3),
    },
    "mlp bias": {"mlp_bias": True, "tie_word_embeddings": True},
    "both biases": {"attention_bias": True, "mlp_bias": True, "dtype": "bfloat16"},
    "old spelling": {"rope_parameters": rope(5e3, LLAMA3), "old": True},
}


def write_reference(folder: Path, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """Save a random Llama of transformers; return ids and what it computes from them.

    ``hidden`` are the residual streams before, between and after the layers
    [L + 1, B, S, D], the last one after the final norm.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    dtype, old = changes.pop("dtype", "float16"), changes.pop("old", False)
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))
    for name, parameter in llama.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
    llama.to(getattr(torch, dtype)).save_pretrained(folder)
    if old:
        spell_as_before(folder / "config.json")
    llama = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(llama.config.vocab_size, (BATCH, LENGTH))
    mask = torch.arange(LENGTH)[None] < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        out = llama(tokens, attention_mask=mask.long(), output_hidden_states=True)
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "logits": out.logits.numpy(),
        "hidden": np.stack([hidden.numpy() for hidden in out.hidden_states]),
    }


def spell_as_before(file: Path) -> None:
    """Rewrite a config.json of transformers 5 as transformers 4 wrote it."""
    config = json.loads(file.read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    scaled = parameters["rope_type"] != "default"
    config["rope_scaling"] = parameters if scaled else None
    file.write_text(json.dumps(config))


def unpack_golden(case: str, folder: Path) -> dict[str, np.ndarray]:
    """Lay a golden out as a Hugging Face folder; return ids and outputs."""
    everything = load_file(GOLDENS)
    tensors = {
        name.removeprefix(f"{case}/"): tensor
        for name, tensor in everything.items()
        if name.startswith(f"{case}/")
    }
    outputs = {name: tensors.pop(name) for name in OUTPUTS}
    with safe_open(GOLDENS, framework="numpy") as file:
        (folder / "config.json").write_text(file.metadata()[case])
    save_file(tensors, folder / "model.safetensors")
    return outputs


def make_goldens() -> None:
    everything, configs = {}, {}
    for case, changes in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            outputs = write_reference(Path(name), **changes)
            tensors = {**load_file(Path(name) / "model.safetensors"), **outputs}
            configs[case] = (Path(name) / "config.json").read_text()
        everything |= {f"{case}/{name}": tensor for name, tensor in tensors.items()}
    save_file(everything, GOLDENS, metadata=configs)


if __name__ == "__main__":
    make_goldens()
