import json

import pytest

from jaxplan.config.hugging_face import (
    load_hf_shape,
    read_hf_shape,
    read_peft_config,
    write_hf_config,
    write_peft_config,
)
from jaxplan.config.schema import LoraConfig, ModelConfig, RopeScalingConfig

SCALING = RopeScalingConfig(factor=8.0, original_max_position_embeddings=32)
MODEL = ModelConfig(rope_theta=5e5, rope_scaling=SCALING, attention_bias=True)


def test_both_spellings_of_rotary_settings_are_read():
    written = write_hf_config(MODEL, 101)
    old = {k: v for k, v in written.items() if k != "rope_parameters"}
    new = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta")}
    for spelling in (old, new, json.loads(json.dumps(written))):
        config = ModelConfig(**read_hf_shape(spelling))
        assert config == ModelConfig(
            vocab_size=101, rope_theta=5e5, rope_scaling=SCALING, attention_bias=True
        )


def test_where_both_spellings_stand_the_older_wins_as_in_transformers():
    written = write_hf_config(MODEL, 101)
    written["rope_scaling"] = {**written["rope_scaling"], "factor": 2.0}
    assert read_hf_shape(written)["rope_scaling"].factor == 2.0


def test_what_is_absent_means_what_it_means_to_transformers():
    hf = {
        "vocab_size": 10,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    shape = read_hf_shape(hf)
    assert shape["kv_heads"] == 4
    assert shape["head_dim"] == 8
    assert shape["rope_theta"] == 10_000
    assert shape["rope_scaling"] is None
    assert shape["norm_eps"] == 1e-6
    assert not shape["tie_embeddings"]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaConfig(**hf)
    assert theirs.num_key_value_heads == shape["kv_heads"]
    assert theirs.head_dim == shape["head_dim"]
    assert theirs.rope_parameters["rope_theta"] == shape["rope_theta"]
    assert theirs.rms_norm_eps == shape["norm_eps"]
    assert theirs.tie_word_embeddings == shape["tie_embeddings"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'; only 'llama' is known"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'; only 'silu' is known"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn'; only"),
        ({"rope_parameters": {"type": "linear"}}, "rope_type='linear'; only"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "'llama3' without factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_what_this_llama_lacks_is_refused(changes, sentence):
    hf = {**write_hf_config(ModelConfig(), 10), **changes}
    with pytest.raises(ValueError, match=r"config\.json: ") as error:
        read_hf_shape(hf)
    assert sentence in str(error.value)


def test_all_mistakes_of_a_config_are_told_at_once():
    with pytest.raises(ValueError, match="model_type") as error:
        read_hf_shape({"model_type": "gpt2", "vocab_size": 3})
    assert len(str(error.value).splitlines()) == 5


def test_a_folder_without_a_config_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: no such file"):
        load_hf_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json: not JSON"):
        load_hf_shape(tmp_path)


def test_what_came_with_a_model_goes_with_it_but_for_its_shape():
    about = {"eos_token_id": [7, 8], "max_position_embeddings": 99, "hidden_size": 1}
    hf = write_hf_config(MODEL, 101, "bfloat16", about)
    assert hf["eos_token_id"] == [7, 8]
    assert hf["max_position_embeddings"] == 99
    assert hf["hidden_size"] == MODEL.width
    assert hf["dtype"] == hf["torch_dtype"] == "bfloat16"


def test_settings_of_adapters_come_back_from_those_of_peft():
    lora = LoraConfig(rank=8, alpha=3.0, rslora=True, targets=("query", "down"))
    peft = write_peft_config(lora, "/models/base")
    assert read_peft_config(json.loads(json.dumps(peft))) == lora
    assert read_peft_config(peft | {"target_modules": "all-linear"}).targets == (
        LoraConfig().targets
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only 'LORA' is known"),
        ({"bias": "all"}, "bias='all'; only 'none' is known"),
        ({"use_dora": True}, "use_dora=True; only False is known"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern={'q_proj': 2}; only"),
        (
            {"target_modules": ["embed_tokens"]},
            "target_modules=['embed_tokens']; known",
        ),
        ({"target_modules": ".*_proj"}, "target_modules='.*_proj'; known are q_proj"),
        ({"r": None}, "r is missing"),
    ],
)
def test_adapters_of_another_kind_are_refused(changes, sentence):
    peft = write_peft_config(LoraConfig(rank=8), "") | changes
    with pytest.raises(ValueError, match=r"adapter_config\.json: ") as error:
        read_peft_config(peft)
    assert sentence in str(error.value)
