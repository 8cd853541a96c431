"""The estimate against what the compiler says."""

import dataclasses
from pathlib import Path

import pytest

from jaxplan.config.reader import load_config
from jaxplan.config.schema import ModelConfig, RunConfig
from jaxplan.envs.worlds import make_env
from jaxplan.io.stopping import StopRequest
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.text.tokenizer import load_tokenizer
from jaxplan.train.memory import STAGES, plan_memory
from jaxplan.train.memory_compiled import compiled_bytes
from jaxplan.train.setting import Setting
from tests.train.test_memory import CONFIGS

LARGE_VOCAB = 128_256


@pytest.mark.slow
@pytest.mark.parametrize(("name", "remat"), [("quickstart", "layer"), ("12m", "none")])
def test_the_estimate_is_what_the_compiler_says_and_rather_more(name, remat):
    config = load_config(CONFIGS / "quickstart.yaml")
    model = load_config(CONFIGS / "models" / f"{name}.yaml").model
    # Every layer of a rollout is compiled for itself: four of eight take half the time.
    model = dataclasses.replace(model, remat=remat, layers=min(model.layers, 4))
    config = dataclasses.replace(config, model=model)
    tokenizer, env = load_tokenizer("shipped"), make_env(config.env)
    own = Setting(
        config=config,
        run_dir=Path(),
        env=env,
        language=make_language(tokenizer, env, config.plan),
        vocab_size=tokenizer.vocab_size,
        turn_tokens=longest_turn(tokenizer, env, config.plan),
        stop=StopRequest(),
    )
    plan, compiled = plan_memory(own), compiled_bytes(own)
    told = {stage: plan.of_program(stage) / compiled[stage] for stage in STAGES}
    assert all(0.85 < ratio < 1.25 for ratio in told.values()), told


@pytest.mark.slow
def test_updates_never_hold_all_logits_of_a_large_vocabulary(on_shore):
    model = ModelConfig(
        width=16,
        layers=1,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn_width=32,
        vocab_size=LARGE_VOCAB,
    )
    config = RunConfig(model=model)
    config = dataclasses.replace(
        config,
        sft=dataclasses.replace(config.sft, batch_segments=32, observation_weight=1.0),
    )
    own = on_shore(config)
    compiled = compiled_bytes(own)
    logits = LARGE_VOCAB * 4
    # All 512 tokens of a segment have a loss, and PPO scores 120 in each of 32 lanes;
    # both updates hold less in all than one copy of [B, S, V] would take.
    assert compiled["sft"] < 0.35 * 32 * 512 * logits
    assert compiled["ppo update"] < 0.6 * 32 * 512 * logits
