import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxplan.config.hugging_face import load_hf_shape
from jaxplan.config.reader import to_yaml
from jaxplan.config.schema import (
    LoraConfig,
    MeshConfig,
    ModelConfig,
    PpoConfig,
    RunConfig,
    SftConfig,
    TextConfig,
)
from jaxplan.core.mesh import make_mesh
from jaxplan.core.specs import abstract_tensors, init_tensors
from jaxplan.io.checkpoints import save_checkpoint
from jaxplan.io.weights import (
    check_weights,
    export_run,
    keep_frozen,
    load_agent,
    load_llama,
    stage_specs,
)
from jaxplan.models.params import agent_specs, init_params, split_trained
from jaxplan.text.tokenizer import load_tokenizer
from jaxplan.train.state import start_params

MODEL = ModelConfig(
    width=32, layers=2, heads=2, head_dim=16, ffn_width=48, attention_bias=True
)
VOCAB = load_tokenizer("shipped").vocab_size


def agent_of(seed):
    return init_params(jax.random.key(seed), MODEL, VOCAB)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has saved both stages, with more in the state than the agent."""
    run = tmp_path_factory.mktemp("runs") / "own"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(RunConfig(model=MODEL)))
    states = {
        "sft": {"params": agent_of(1), "skipped": jnp.int32(0)},
        "ppo": {"learner": {"params": agent_of(2)}, "key": jax.random.key(0)},
    }
    for stage, state in states.items():
        save_checkpoint(run / "checkpoints" / stage, 5, state, {})
    return run


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "hf"
    assert export_run(run, out) == "ppo"
    return out


def start(model):
    mesh = make_mesh(MeshConfig())
    return start_params(jax.random.key(9), model, agent_specs(model, VOCAB), mesh)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_agent_is_read_out_of_a_checkpoint_without_the_rest(run):
    target = abstract_tensors(agent_specs(MODEL, VOCAB))
    same(load_agent(run, "sft", target), agent_of(1))
    same(load_agent(run, "ppo", target), agent_of(2))


def test_a_run_starts_from_what_another_exported(exported):
    model = ModelConfig(**load_hf_shape(exported), weights=str(exported))
    same(start(model), agent_of(2))


def test_a_value_head_that_is_not_there_is_drawn(run, tmp_path):
    out = tmp_path / "hf"
    assert export_run(run, out, "sft", "bfloat16", 20_000) == "sft"
    assert (out / "model.safetensors.index.json").exists()
    (out / "value_head.safetensors").unlink()
    model = ModelConfig(**load_hf_shape(out), weights=str(out))
    agent = start(model)
    rounded = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), agent_of(1).llama
    )
    same(agent.llama, rounded)
    assert jnp.std(agent.value.hidden) > 0


def test_transformers_finds_tokenizer_and_config(exported):
    transformers = pytest.importorskip("transformers")
    ours = load_tokenizer("shipped")
    theirs = transformers.AutoTokenizer.from_pretrained(
        exported, trust_remote_code=False
    )
    text = "<plan> collect wood 3n1w until 5 wood , then place table</plan>Move North é"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    config = transformers.AutoConfig.from_pretrained(exported, trust_remote_code=False)
    assert config.hidden_size == MODEL.width
    assert config.eos_token_id is None


def test_what_lies_beside_the_tokenizer_travels(run, exported, tmp_path):
    """A run that started from a folder leaves one with the same trimmings."""
    folder, other = tmp_path / "start", tmp_path / "run"
    folder.mkdir(), other.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    hf = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [3, 4]}
    (folder / "config.json").write_text(json.dumps(hf))
    model = dataclasses.replace(MODEL, weights=str(folder), vocab_size=VOCAB)
    config = RunConfig(model=model, text=TextConfig(tokenizer=str(folder)))
    check_weights(config)
    (other / "config.yaml").write_text(to_yaml(config))
    (other / "checkpoints").symlink_to(run / "checkpoints")
    export_run(other, tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == settings
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == hf


def test_a_vocabulary_with_room_to_spare_goes_through(exported, tmp_path):
    """Models often have more rows than their tokenizer has ids."""
    tokenizer = load_tokenizer("shipped").fill_up(VOCAB + 3)
    assert tokenizer.vocab_size == VOCAB + 3
    assert tokenizer.text_of(VOCAB + 2) == ""
    assert tokenizer.encode("Move North") == load_tokenizer("shipped").encode(
        "Move North"
    )
    with pytest.raises(ValueError, match=f"vocab_size={VOCAB - 1}, but the tokenizer"):
        tokenizer.fill_up(VOCAB - 1)


def test_weights_that_do_not_fit_are_refused_before_anything_is_made(exported):
    model = ModelConfig(**load_hf_shape(exported), weights=str(exported))
    wider = dataclasses.replace(model, ffn_width=64)
    with pytest.raises(ValueError, match=r"\{0-1\}\.mlp\.up_proj\.weight: shape"):
        check_weights(RunConfig(model=wider))
    check_weights(RunConfig(model=model))
    check_weights(RunConfig())


def test_nothing_is_overwritten_and_what_is_not_there_is_named(run, exported, tmp_path):
    with pytest.raises(FileExistsError, match="exists; name a new folder"):
        export_run(run, exported)
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        export_run(tmp_path, tmp_path / "out")
    (tmp_path / "config.yaml").write_text(to_yaml(RunConfig(model=MODEL)))
    with pytest.raises(FileNotFoundError, match="no checkpoint of sft; there are"):
        export_run(tmp_path, tmp_path / "out", "sft")
    with pytest.raises(FileNotFoundError, match="no checkpoint of any stage"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_files_hold_the_names_of_hugging_face(exported):
    names = load_file(exported / "model.safetensors").keys()
    assert "model.layers.1.self_attn.q_proj.bias" in names
    assert "lm_head.weight" not in names  # tied
    assert load_file(exported / "value_head.safetensors").keys() == {
        "hidden",
        "hidden_bias",
        "out",
        "out_bias",
    }


LORA = LoraConfig(rank=2, alpha=3.0, targets=("query", "down"))
ADAPTED = dataclasses.replace(MODEL, lora=LORA)
CRITIC = dataclasses.replace(MODEL, width=16, vocab_size=VOCAB + 2, lora=LORA)
GROWN = RunConfig(model=ADAPTED, ppo=PpoConfig(critic=CRITIC))


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """The agent of a run with adapters and a critic of its own, and its folder."""
    run = tmp_path_factory.mktemp("grown") / "own"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(GROWN))
    agent = init_tensors(jax.random.key(3), stage_specs(GROWN, VOCAB, "ppo"))
    learns, frozen = split_trained(agent)
    save_checkpoint(run / "checkpoints" / "ppo", 5, {"learner": {"params": learns}}, {})
    keep_frozen(run, frozen)
    return run, agent


def test_what_learns_and_what_it_stands_beside_are_put_together(grown):
    run, agent = grown
    target = abstract_tensors(stage_specs(GROWN, VOCAB, "ppo"))
    same(load_agent(run, "ppo", target), agent)
    same(load_llama(run, "ppo", target.llama), agent.llama)


def test_adapters_and_a_critic_travel_and_the_value_head_with_it(grown, tmp_path):
    run, agent = grown
    assert export_run(run, tmp_path / "out") == "ppo"
    assert not (tmp_path / "out" / "value_head.safetensors").exists()
    folders = {tmp_path / "out": MODEL, tmp_path / "out" / "critic": CRITIC}
    actor, judge = (
        ModelConfig(**load_hf_shape(folder), weights=str(folder)) for folder in folders
    )
    assert actor.lora == judge.lora == LORA
    check_weights(RunConfig(model=actor, ppo=PpoConfig(critic=judge)))
    same(start(actor).llama, agent.llama)
    mesh, bare = make_mesh(MeshConfig()), dataclasses.replace(judge, lora=LoraConfig())
    specs = agent_specs(bare, VOCAB + 2)
    own = start_params(jax.random.key(9), judge, specs, mesh)
    same((own.llama, own.value), (agent.critic, agent.value))
    with pytest.raises(ValueError, match=r"sft\.lora=false, but .* has adapters"):
        check_weights(RunConfig(model=actor, sft=SftConfig(lora=False)))


def test_a_critic_that_cannot_read_all_tokens_is_refused():
    small = dataclasses.replace(CRITIC, vocab_size=VOCAB - 1)
    with pytest.raises(ValueError, match=f"vocab_size={VOCAB - 1}, but the tokenizer"):
        check_weights(RunConfig(ppo=PpoConfig(critic=small)))


def test_adapters_may_wait_for_ppo():
    config = RunConfig(model=ADAPTED, sft=SftConfig(lora=False))
    bare, adapted = (
        abstract_tensors(agent_specs(model, VOCAB)) for model in (MODEL, ADAPTED)
    )
    for stage, expected in {"start": bare, "sft": bare, "ppo": adapted}.items():
        assert abstract_tensors(stage_specs(config, VOCAB, stage)) == expected
    throughout = stage_specs(RunConfig(model=ADAPTED), VOCAB, "sft")
    assert abstract_tensors(throughout) == adapted
