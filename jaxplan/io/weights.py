"""Weights on their way in and out of a run: where it starts, and what it leaves.

A run starts from chance or from a Hugging Face folder, and any of its policies goes
back into one, with its tokenizer beside it.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from jaxplan.config.reader import load_config
from jaxplan.config.schema import RunConfig
from jaxplan.core.specs import abstract_tensors
from jaxplan.io.checkpoints import latest_step, load_checkpoint
from jaxplan.models.convert import (
    SHARD_BYTES,
    check_hf_llama,
    load_value_head,
    save_hf_llama,
    save_value_head,
)
from jaxplan.models.params import agent_specs
from jaxplan.text.tokenizer import Tokenizer, find_tokenizer, load_tokenizer

# Where in the state of a stage the agent is, the last stage first.
_AGENT = {"ppo": "learner.params", "sft": "params"}
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
    model = config.model
    if model.weights is not None and model.vocab_size is not None:
        check_hf_llama(model.weights, model, model.vocab_size)
        load_value_head(model.weights, model)
        load_tokenizer(config.text.tokenizer).fill_up(model.vocab_size)


def load_agent(run_dir: Path, stage: str, target: Any) -> Any:
    """Load the agent that a stage, ``sft`` or ``ppo``, has saved last.

    Args:
        run_dir: of the run.
        stage: whose agent.
        target: abstract arrays with the structure of the agent.
    """
    directory = run_dir / "checkpoints" / stage
    return load_checkpoint(directory, None, target, _AGENT[stage])[0]


def export_run(
    run_dir: Path,
    out: Path,
    stage: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write a run's agent as a Hugging Face folder, with tokenizer and value head.

    Args:
        run_dir: of the run.
        out: the folder; it may exist if it is empty.
        stage: ``sft`` or ``ppo``; None takes the last one that has saved.
        dtype: of the Llama's tensors; the value head stays float32.
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
    specs = agent_specs(config.model, tokenizer.vocab_size)
    agent = load_agent(run_dir, stage, abstract_tensors(specs))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    about = _about(config, tokenizer)
    save_hf_llama(partial, config.model, agent.llama, dtype, shard_bytes, about)
    save_value_head(partial, agent.value)
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


def _about(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Keys of ``config.json`` besides the shape: those it came with, if it came."""
    own = Path(config.model.weights or "").expanduser() / "config.json"
    if config.model.weights is not None and own.is_file():
        return json.loads(own.read_text(encoding="utf-8"))
    # What transformers takes for an absent key are the ids of Llama 2.
    ends = {"bos_token_id": None, "eos_token_id": None}
    return ends | {"pad_token_id": tokenizer.pad_id}
