"""A chat model is addressed in the words of its template: once, by the first prompt.

What follows is one stream of observations and turns, without templates: a template
would write the history anew each time, and drop what it takes for old thoughts.
"""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from jaxplan.config.schema import RunConfig
from jaxplan.text.tokenizer import Tokenizer, find_tokenizer, load_tokenizer


def open_tokenizer(config: RunConfig) -> Tokenizer:
    """Load a run's tokenizer, with room for all ids of its model and its chat template.

    The template is that of the folder the tokenizer lies in, or else of the weights;
    many have none.

    Raises:
        FileNotFoundError: there is no tokenizer.
        ValueError: it cannot be used, or its template cannot.
    """
    tokenizer = load_tokenizer(config.text.tokenizer).fill_up(config.model.vocab_size)
    folders = [find_tokenizer(config.text.tokenizer).parent]
    if config.model.weights is not None:
        folders.append(Path(config.model.weights).expanduser())
    found = [folder for folder in folders if _has_template(folder)]
    if not found:
        return tokenizer
    return dataclasses.replace(tokenizer, address=_addresser(found[0]))


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return False
    try:
        return bool(
            json.loads(settings.read_text(encoding="utf-8")).get("chat_template")
        )
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"text.tokenizer: {settings} is not valid JSON ({error}): it may be "
            "damaged, copy it again"
        ) from error


def _addresser(folder: Path) -> Callable[[str], str]:
    """Load the template; no code that comes with it is run, and no network asked."""
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True
    )
    return partial(_address, chat, folder)


def _address(chat: Any, folder: Path, text: str) -> str:
    """Say a text to the model, up to where it is to answer.

    The line breaks there are left out: the first observation brings its own.
    """
    said = [{"role": "user", "content": text}]
    try:
        rendered = chat.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise whatever they like
        raise ValueError(
            f"the chat template in {folder} cannot be used ({error}); mend it, or take "
            "a copy of the folder without chat_template"
        ) from error
    return rendered.rstrip("\n")
