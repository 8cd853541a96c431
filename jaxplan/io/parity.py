"""Our logits against those of transformers, on a folder of weights.

If adapters lie in it, they take part, and on the other side it is PEFT that adds them.
"""

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.config.hugging_face import ADAPTER, load_hf_shape
from jaxplan.config.schema import ModelConfig
from jaxplan.models.adapter_files import load_adapters
from jaxplan.models.convert import load_hf_llama
from jaxplan.models.heads import lm_logits
from jaxplan.models.llama import forward
from jaxplan.models.params import replace_lora
from jaxplan.models.visibility import NO_PLAN, TokenMeta

BATCH, LENGTH = 2, 128  # sequences of random tokens, and tokens in each


@dataclasses.dataclass(frozen=True)
class Parity:
    """How far two sets of logits are apart, and how large they are."""

    difference: float
    largest: float


def compare_logits(folder: Path | str) -> Parity:
    """Compute the logits of random tokens twice, in float32.

    Raises:
        ImportError: torch is not installed, or not peft, where it is needed.
    """
    config = ModelConfig(**load_hf_shape(folder))
    vocab_size = config.vocab_size or 0
    tokens = np.random.default_rng(0).integers(0, vocab_size, (BATCH, LENGTH))
    # One after the other: there may not be room for both models.
    theirs = _their_logits(folder, tokens)
    ours = _our_logits(folder, config, tokens)
    return Parity(
        difference=float(np.max(np.abs(ours - theirs))),
        largest=float(np.max(np.abs(theirs))),
    )


def _their_logits(folder: Path | str, tokens: np.ndarray) -> np.ndarray:
    torch = _import("torch", "the CPU build will do")
    from transformers import LlamaForCausalLM

    path = Path(folder).expanduser()
    llama = LlamaForCausalLM.from_pretrained(
        path, dtype=torch.float32, local_files_only=True
    )
    if (path / ADAPTER).exists():
        peft = _import("peft", "there are adapters")
        llama = peft.PeftModel.from_pretrained(llama, path / ADAPTER)
    with torch.no_grad():
        return llama(torch.from_numpy(tokens)).logits.numpy()


def _import(package: str, remark: str) -> Any:  # none of these is a dependency of ours
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"the comparison needs {package}: pip install {package} ({remark})"
        ) from error


def _our_logits(
    folder: Path | str, config: ModelConfig, tokens: np.ndarray
) -> np.ndarray:
    position = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), tokens.shape)
    meta = TokenMeta(
        position=position,
        episode=jnp.ones_like(position),
        turn=jnp.zeros_like(position),
        plan=jnp.full_like(position, NO_PLAN),
        active_plan=jnp.zeros_like(position),
    )
    with jax.default_matmul_precision("highest"):
        params = load_hf_llama(folder, config, config.vocab_size or 0)
        params = replace_lora(params, load_adapters(folder, config, None))
        hidden = jax.jit(forward, static_argnums=(3, 4))(
            params, jnp.asarray(tokens, jnp.int32), meta, config, 1
        )
        return np.asarray(jax.jit(lm_logits)(params, hidden))
