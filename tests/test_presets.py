"""The shapes under ``configs/models``, against what was published."""

import math
from pathlib import Path

import jax
import pytest

from jaxplan.config.hugging_face import read_hf_shape
from jaxplan.config.reader import load_config
from jaxplan.config.schema import ModelConfig
from jaxplan.models.params import llama_specs
from jaxplan.text.tokenizer import load_tokenizer

MODELS = Path(__file__).resolve().parent.parent / "configs" / "models"

# num_parameters of the model cards: the counts of the safetensors on the hub.
PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.3-70b": 70_553_706_496,
}
OURS = {"quickstart": 0.83e6, "12m": 12e6, "100m": 100e6}


def preset(name: str) -> ModelConfig:
    return load_config(MODELS / f"{name}.yaml").model


def parameters(config: ModelConfig) -> int:
    """Count what is declared; nothing is allocated."""
    vocab_size = config.vocab_size or load_tokenizer("shipped").vocab_size
    leaves = jax.tree.leaves(llama_specs(config, vocab_size))
    return sum(math.prod(spec.shape) for spec in leaves)


def test_these_are_all_presets():
    assert {file.stem for file in MODELS.iterdir()} == {*PUBLISHED, *OURS}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_a_published_llama_has_the_published_number_of_parameters(name, count):
    assert parameters(preset(name)) == count


@pytest.mark.parametrize(("name", "size"), OURS.items())
def test_a_preset_has_about_the_size_it_is_named_for(name, size):
    assert parameters(preset(name)) == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_llama_turns_as_published(name):
    """config.json of the hub, what does not show in the number of parameters."""
    published = read_hf_shape(
        {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": preset(name).width,
            "num_hidden_layers": preset(name).layers,
            "num_attention_heads": {"1b": 32, "3b": 24, "8b": 32, "0b": 64}[name[-2:]],
            "num_key_value_heads": 8,
            "intermediate_size": preset(name).ffn_width,
            "rms_norm_eps": 1e-5,
            "rope_scaling": {
                "factor": 32.0 if "3.2" in name else 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": "3.2" in name,
            "vocab_size": 128256,
        }
    )
    assert ModelConfig(**published, compute_dtype="bfloat16") == preset(name)


def test_the_quickstart_is_the_preset_of_its_name():
    quickstart = load_config(MODELS.parent / "quickstart.yaml")
    assert quickstart.model == preset("quickstart")


def test_a_preset_is_a_base_beside_another(tmp_path):
    own = tmp_path / "own.yaml"
    bases = [MODELS.parent / "quickstart.yaml", MODELS / "llama-3.2-1b.yaml"]
    own.write_text(f"base: [{bases[0]}, {bases[1]}]\nmodel: {{remat: none}}\n")
    config = load_config(own)
    assert config.model.width == 2048
    assert config.model.remat == "none"
    assert config.plan == load_config(bases[0]).plan
