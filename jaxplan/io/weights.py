"""Weights on their way in and out of a run: where it starts, and what it leaves.

A run starts from chance or from a Hugging Face folder, and any of its policies goes
back into one, with its tokenizer beside it.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from jaxplan.config.reader import load_config
from jaxplan.config.schema import LoraConfig, ModelConfig, RunConfig
from jaxplan.core.specs import abstract_tensors, spec_tree
from jaxplan.io.checkpoints import latest_step, load_checkpoint, save_once
from jaxplan.models.adapter_files import check_adapters, save_adapters
from jaxplan.models.convert import (
    SHARD_BYTES,
    check_hf_llama,
    load_value_head,
    save_hf_llama,
    save_value_head,
)
from jaxplan.models.params import (
    AgentParams,
    LlamaParams,
    agent_specs,
    join,
    lora_of,
    split_trained,
)
from jaxplan.text.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

# Where in the state of a stage the agent is, the last stage first.
_AGENT = {"ppo": "learner.params", "sft": "params"}
# Where a run keeps, once, what adapters stand beside; by its place in the agent.
_BASES = {"llama": "base", "critic": "critic_base"}
CRITIC = "critic"  # folder of a critic of its own, in the folder of a policy
# What may lie beside a tokenizer.json and belongs to it.
_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


def check_weights(config: RunConfig) -> None:
    """See that a run can start from the weights it names; nothing large is read.

    Raises:
        ValueError: they do not fit; everything that is wrong with them is listed.
    """
    for model in filter(None, (config.model, config.ppo.critic)):
        if model.vocab_size is not None:
            load_tokenizer(config.text.tokenizer).fill_up(model.vocab_size)
        if model.weights is not None and model.vocab_size is not None:
            check_hf_llama(model.weights, model, model.vocab_size)
            load_value_head(model.weights, model)
            adapted = check_adapters(model.weights, model)
            if adapted and model is config.model and not config.sft.lora:
                raise ValueError(
                    f"sft.lora=false, but {model.weights} has adapters, which would "
                    "learn instead of the weights: merge them first, with peft"
                )


def stage_specs(config: RunConfig, vocab_size: int, stage: str) -> AgentParams:
    """Declare the agent that a stage trains: that of a run, at ``sft`` or ``ppo``.

    Args:
        config: of the run.
        vocab_size: of the tokenizer.
        stage: any other: what the run begins with, from chance.
    """
    if stage == "ppo":
        return agent_specs(config.model, vocab_size, config.ppo.critic)
    adapted = stage == "sft" and config.sft.lora
    lora = config.model.lora if adapted else LoraConfig()
    return agent_specs(dataclasses.replace(config.model, lora=lora), vocab_size)


def keep_frozen(run_dir: Path, frozen: AgentParams) -> None:
    """Save, once in a run, the weights that adapters stand beside.

    Raises:
        CheckpointMismatchError: the run has begun with other weights.
    """
    for place, name in _BASES.items():
        save_once(run_dir / "checkpoints" / name, getattr(frozen, place))


def load_agent(run_dir: Path, stage: str, target: AgentParams) -> AgentParams:
    """Load the agent that a stage, ``sft`` or ``ppo``, has saved last.

    Args:
        run_dir: of the run.
        stage: whose agent.
        target: abstract arrays with the structure of the agent.
    """
    trained, frozen = split_trained(target)
    directory = run_dir / "checkpoints" / stage
    trained, _ = load_checkpoint(directory, None, trained, _AGENT[stage])
    bases = {
        place: _load_frozen(run_dir, place, getattr(frozen, place)) for place in _BASES
    }
    return join(trained, spec_tree(AgentParams, value=frozen.value, **bases))


def load_llama(run_dir: Path, stage: str, target: LlamaParams) -> LlamaParams:
    """Load the Llama alone that a stage has saved last: all that a player needs.

    Args:
        run_dir: of the run.
        stage: whose Llama.
        target: abstract arrays with its structure, adapters too.
    """
    trained, frozen = split_trained(target)
    directory = run_dir / "checkpoints" / stage
    trained, _ = load_checkpoint(directory, None, trained, f"{_AGENT[stage]}.llama")
    return join(trained, _load_frozen(run_dir, "llama", frozen))


def _load_frozen(run_dir: Path, place: str, frozen: Any) -> Any:
    if not jax.tree.leaves(frozen):
        return frozen
    return load_checkpoint(run_dir / "checkpoints" / _BASES[place], None, frozen)[0]


def export_run(
    run_dir: Path,
    out: Path,
    stage: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a run's agent as a Hugging Face folder, with tokenizer and value head.

    Adapters go into a folder ``adapter`` in it, in PEFT's format; a critic of its own
    goes into a folder ``critic``, and its value head with it.

    Args:
        run_dir: of the run.
        out: the folder; it may exist if it is empty.
        stage: ``sft`` or ``ppo``; None takes the last one that has saved.
        dtype: of the Llama's tensors; value head and adapters stay float32.
        shard_bytes: the largest file.

    Returns:
        The stage.

    Raises:
        FileNotFoundError: there is no such run, or it has saved nothing.
        FileExistsError: there is something in ``out``.
    """
    if not (run_dir / "config.yaml").is_file():
        raise FileNotFoundError(f"{run_dir}: not the directory of a run")
    saved = [s for s in _AGENT if latest_step(run_dir / "checkpoints" / s) is not None]
    stage = stage or next(iter(saved), "any stage")
    if stage not in saved:
        raise FileNotFoundError(
            f"{run_dir}: no checkpoint of {stage}; there are those of {saved or 'none'}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists; name a new folder, or empty this one")
    config = load_config(run_dir / "config.yaml", resolved=True)
    tokenizer = load_tokenizer(config.text.tokenizer).fill_up(config.model.vocab_size)
    specs = stage_specs(config, tokenizer.vocab_size, stage)
    agent = load_agent(run_dir, stage, abstract_tensors(specs))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)

    def save(model: ModelConfig, llama: LlamaParams, inside: str) -> Path:
        folder, about = partial / inside, _about(model, tokenizer)
        save_hf_llama(folder, model, llama, dtype, shard_bytes, about)
        save_adapters(folder, model, lora_of(llama), out.resolve() / inside)
        return folder

    trunk = save(config.model, agent.llama, "")
    if config.ppo.critic is not None and agent.critic is not None:
        trunk = save(config.ppo.critic, agent.critic, CRITIC)
    save_value_head(trunk, agent.value)
    copy_tokenizer(config.text.tokenizer, partial)
    os.replace(partial, out)
    return stage


def copy_tokenizer(name: str, folder: Path) -> None:
    """Put a tokenizer into a folder so that AutoTokenizer finds and loads it.

    Args:
        name: as for ``load_tokenizer``.
        folder: where to.
    """
    file = find_tokenizer(name)
    shutil.copyfile(file, folder / "tokenizer.json")
    for beside in _TOKENIZER_FILES:
        if (file.parent / beside).is_file():
            shutil.copyfile(file.parent / beside, folder / beside)
    settings = folder / "tokenizer_config.json"
    if not settings.exists():
        text = {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings.write_text(json.dumps(text, indent=2) + "\n")


def _about(model: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Keys of ``config.json`` besides the shape: those it came with, if it came."""
    own = Path(model.weights or "").expanduser() / "config.json"
    if model.weights is not None and own.is_file():
        return json.loads(own.read_text(encoding="utf-8"))
    # What transformers takes for an absent key are the ids of Llama 2.
    ends = {"bos_token_id": None, "eos_token_id": None}
    return ends | {"pad_token_id": tokenizer.pad_id}
