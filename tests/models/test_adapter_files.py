import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.schema import LoraConfig, ModelConfig
from jaxplan.io.parity import compare_logits
from jaxplan.models.adapter_files import (
    check_adapters,
    load_adapters,
    save_adapters,
)
from jaxplan.models.convert import save_hf_llama
from jaxplan.models.params import init_params, lora_of
from tests.fakes import TINY_MODEL, TINY_VOCAB
from tests.models.test_lora import lively

LORA = LoraConfig(rank=3, alpha=5.0, rslora=True)
MODEL = dataclasses.replace(TINY_MODEL, lora=LORA)


def written(folder, config=MODEL):
    llama = lively(init_params(jax.random.key(0), config, TINY_VOCAB).llama)
    save_hf_llama(folder, config, llama)
    save_adapters(folder, config, lora_of(llama), folder)
    return llama


def test_adapters_come_back_bit_for_bit_with_their_settings(tmp_path):
    llama = written(tmp_path)
    shape = load_hf_shape(tmp_path)
    assert shape["lora"] == LORA
    config = ModelConfig(**shape)
    assert check_adapters(tmp_path, config)
    loaded = load_adapters(tmp_path, config, None)
    jax.tree.map(np.testing.assert_array_equal, loaded, lora_of(llama))


def test_a_folder_without_adapters_has_none(tmp_path):
    save_adapters(tmp_path, MODEL, None, tmp_path)
    assert not check_adapters(tmp_path, MODEL)
    assert load_adapters(tmp_path, MODEL, None) is None
    assert not list(tmp_path.iterdir())


def test_the_files_are_those_of_peft(tmp_path):
    llama = written(tmp_path)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * MODEL.layers
    name = "base_model.model.model.layers.1.self_attn.o_proj.lora_{}.weight"
    own = lora_of(llama)["attention_out"]
    heads = MODEL.heads * MODEL.head_dim
    np.testing.assert_array_equal(
        tensors[name.format("A")], own.a[1].reshape(heads, 3).T
    )
    np.testing.assert_array_equal(tensors[name.format("B")], own.b[1].T)
    peft = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (peft["r"], peft["lora_alpha"], peft["use_rslora"]) == (3, 5.0, True)
    assert peft["base_model_name_or_path"] == str(tmp_path)


def test_adapters_that_do_not_fit_are_listed(tmp_path):
    written(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    place = "base_model.model.model.layers"
    del tensors[f"{place}.0.mlp.up_proj.lora_A.weight"]
    tensors[f"{place}.1.mlp.up_proj.lora_B.weight"] = np.zeros((2, 3), np.float32)
    save_file(tensors, file)
    with pytest.raises(ValueError, match="do not fit") as error:
        load_adapters(tmp_path, MODEL, None)
    told = str(error.value)
    assert f"{place}.0.mlp.up_proj.lora_A.weight: missing, expected (3, 32)" in told
    assert f"{place}.1.mlp.up_proj.lora_B.weight: shape (2, 3), expected (48" in told


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "lora",
    [
        LORA,
        LoraConfig(rank=4, alpha=8.0),
        LoraConfig(rank=2, alpha=9.0, targets=("query", "attention_out", "down")),
    ],
    ids=["rslora", "lora", "three targets"],
)
def test_peft_loads_them_and_has_the_same_logits(tmp_path, lora, record_property):
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    written(tmp_path, dataclasses.replace(MODEL, lora=lora))
    parity = compare_logits(tmp_path)
    record_property("logits", f"{parity.difference:.1e}")  # for the table of a report
    assert parity.largest > 0.3
    assert parity.difference < 1e-5
    beside = tmp_path / "adapter"
    beside.rename(tmp_path / "elsewhere")
    bare = compare_logits(tmp_path)
    assert abs(bare.largest - parity.largest) > 1e-4  # the adapters did something
