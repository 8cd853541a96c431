"""One tiny world, model and play for all tests of training."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxplan.config.schema import ModelConfig, PlanConfig, RolloutConfig, RunConfig
from jaxplan.io.stopping import StopRequest
from jaxplan.models.params import AgentParams, init_params
from jaxplan.rollout.rounds import Language, init_carry, run_segment
from jaxplan.rollout.schedule import make_worlds, training_schedule
from jaxplan.rollout.segment import Segment
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.text.tokenizer import Tokenizer, load_tokenizer
from jaxplan.train.setting import Setting as RunSetting
from tests.fakes import Shore

PLAN = PlanConfig(open="{plan}", close="<end>", budget=4)
ROLLOUT = RolloutConfig(
    num_lanes=4,
    segment_tokens=96,
    rounds=8,
    decode_steps=3,
    history=2,
    observation_tokens=8,
)
MODEL = ModelConfig(width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_width=24)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A world, an agent, and the words they have in common."""

    env: Shore
    tokenizer: Tokenizer
    language: Language
    params: AgentParams
    turn_tokens: int
    plan: PlanConfig = PLAN
    rollout: RolloutConfig = ROLLOUT
    model: ModelConfig = MODEL


def lively_params(tokenizer: Tokenizer) -> AgentParams:
    """An agent that often plans, ends its plans, and values states differently."""
    params = init_params(jax.random.key(1), MODEL, tokenizer.vocab_size)
    embed = 40.0 * params.llama.embed
    for marker, bias in ((PLAN.open, 0.8), (PLAN.close, 0.5)):
        embed = embed.at[tokenizer.encode(marker)[0]].add(bias)
    out = jax.random.normal(jax.random.key(2), params.value.out.shape) / 4
    return AgentParams(
        llama=dataclasses.replace(params.llama, embed=embed),
        value=dataclasses.replace(params.value, out=out),
    )


@pytest.fixture(scope="session")
def setting() -> Setting:
    env, tokenizer = Shore(), load_tokenizer("shipped")
    return Setting(
        env=env,
        tokenizer=tokenizer,
        language=make_language(tokenizer, env, PLAN),
        params=lively_params(tokenizer),
        turn_tokens=longest_turn(tokenizer, env, PLAN),
    )


@pytest.fixture(scope="session")
def segment(setting) -> Segment:
    """The second segment of a play, with context from the first before it."""
    worlds = make_worlds(setting.env, jnp.arange(4, dtype=jnp.int32))
    key = jax.random.key(3)
    schedule = training_schedule(worlds, key, 0, ROLLOUT.num_lanes)
    carry = init_carry(setting.env, setting.language, schedule, key, ROLLOUT)
    for _ in range(2):
        carry, played = run_segment(
            setting.params.llama,
            carry,
            setting.language,
            schedule,
            0.9,
            env=setting.env,
            config=ROLLOUT,
            model=MODEL,
            budget=PLAN.budget,
            turn_tokens=setting.turn_tokens,
        )
    return played


@pytest.fixture(scope="session")
def on_shore(setting):
    """A run on the tiny world, whose language is cheap for any vocabulary."""

    def make(config: RunConfig) -> RunSetting:
        tokenizer = setting.tokenizer.fill_up(config.model.vocab_size)
        config = dataclasses.replace(config, plan=setting.plan)
        return RunSetting(
            config=config,
            run_dir=Path(),
            env=setting.env,
            language=make_language(tokenizer, setting.env, setting.plan),
            vocab_size=tokenizer.vocab_size,
            turn_tokens=setting.turn_tokens,
            stop=StopRequest(),
        )

    return make
