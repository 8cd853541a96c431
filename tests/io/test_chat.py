"""The chat template: looked for beside the tokenizer, rendered once, never run."""

import dataclasses
import json

import pytest

from jaxplan.config.schema import ModelConfig, RunConfig, TextConfig
from jaxplan.io.chat import open_tokenizer
from tests.tokenizers import llama3_like

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}"
)
RENDERED = "<|start|>user\n\nPLAY!<|eot|><|start|>assistant"


def config_of(folder, **model) -> RunConfig:
    text = TextConfig(tokenizer=str(folder))
    return dataclasses.replace(RunConfig(), text=text, model=ModelConfig(**model))


def settings(folder, **more) -> None:
    about = {"tokenizer_class": "PreTrainedTokenizerFast"} | more
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def test_without_a_template_the_prompt_is_the_text_alone(tmp_path):
    plain = llama3_like(tmp_path)
    for _ in range(2):
        opened = open_tokenizer(config_of(tmp_path))
        assert opened == plain
        assert opened.encode_prompt("PLAY!") == plain.encode("PLAY!")
        settings(tmp_path)


def test_a_damaged_file_of_settings_is_named(tmp_path):
    llama3_like(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        open_tokenizer(config_of(tmp_path))


@pytest.mark.parametrize("place", ["settings", "file", "weights"])
def test_a_template_opens_the_prompt_up_to_the_first_observation(tmp_path, place):
    tokenizer = llama3_like(tmp_path, ("<|start|>", "<|eot|>"))
    if place == "settings":
        settings(tmp_path, chat_template=TEMPLATE)
    else:
        settings(tmp_path)
    weights = tmp_path
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    if place == "weights":
        weights = tmp_path / "weights"
        weights.mkdir()
        llama3_like(weights, ("<|start|>", "<|eot|>"))
        settings(weights)
        (weights / "chat_template.jinja").write_text(TEMPLATE)
    opened = open_tokenizer(config_of(tmp_path, weights=str(weights)))
    assert opened.address("PLAY!") == RENDERED
    assert opened.encode_prompt("PLAY!") == tokenizer.encode(RENDERED)
    assert opened.encode("PLAY!") == tokenizer.encode("PLAY!")


def test_a_template_that_fails_is_named(tmp_path):
    llama3_like(tmp_path)
    settings(tmp_path, chat_template="{{ raise_exception('no users') }}")
    with pytest.raises(ValueError, match=r"cannot be used \(no users\)"):
        open_tokenizer(config_of(tmp_path)).address("PLAY!")
