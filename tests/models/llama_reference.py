"""The Llama of transformers as the reference, live or as a stored golden.

The golden holds a tiny model's tensors under their Hugging Face names, its config.json,
token ids, and what transformers computes from them. To make it anew (only where the
fixture itself has to change; the numbers are not ours): install torch and run
``python -m tests.models.llama_reference`` in the repository root.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "data" / "llama_golden.safetensors"
OUTPUTS = ("tokens", "logits", "hidden")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write_reference(folder: Path, seed: int = 0, **changes) -> dict[str, np.ndarray]:
    """Save a random Llama of transformers; return ids and what it computes from them.

    ``hidden`` are the residual streams before, between and after the layers
    [L + 1, B, S, D], the last one after the final norm.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    llama = LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()
    for name, parameter in llama.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data.uniform_(0.5, 1.5)
    llama.save_pretrained(folder)
    tokens = torch.randint(llama.config.vocab_size, (2, 40))
    with torch.no_grad():
        out = llama(tokens, output_hidden_states=True)
    return {
        "tokens": tokens.numpy().astype(np.int32),
        "logits": out.logits.numpy(),
        "hidden": np.stack([hidden.numpy() for hidden in out.hidden_states]),
    }


def unpack_golden(folder: Path) -> dict[str, np.ndarray]:
    """Lay the golden out as a Hugging Face folder; return ids and outputs."""
    tensors = load_file(GOLDEN)
    outputs = {name: tensors.pop(name) for name in OUTPUTS}
    with safe_open(GOLDEN, framework="numpy") as file:
        config = file.metadata()["config"]
    (folder / "config.json").write_text(config)
    save_file(tensors, folder / "model.safetensors")
    return outputs


def make_golden() -> None:
    folder = Path(tempfile.mkdtemp())
    rope = {"rope_theta": 10_000.0, **LLAMA3}
    outputs = write_reference(folder, tie_word_embeddings=False, rope_parameters=rope)
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    save_file({**tensors, **outputs}, GOLDEN, metadata={"config": json.dumps(config)})
    shutil.rmtree(folder)


if __name__ == "__main__":
    make_golden()
