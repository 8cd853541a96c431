"""One tiny language, one compiled rollout and one play for all tests of the rollout."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import ModelConfig, PlanConfig, RolloutConfig
from jaxplan.core.roles import Role
from jaxplan.models.params import LlamaParams, init_params
from jaxplan.rollout.rounds import Carry, Language, init_carry, run_segment
from jaxplan.rollout.schedule import Schedule, make_worlds
from jaxplan.rollout.segment import Segment
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.text.tokenizer import Tokenizer, load_tokenizer
from tests.fakes import Shore
from tests.rollout.reference import Words

PLAN = PlanConfig(open="{plan}", close="<end>", budget=4)
ROLLOUT = RolloutConfig(
    num_lanes=6,
    segment_tokens=130,  # two blocks of the cache, and not always room for all rounds
    rounds=18,
    prefill_tokens=6,  # less than an observation: some lanes have to read on
    decode_steps=3,
    history=2,
    observation_tokens=8,
)
MODEL = ModelConfig(
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_width=24,
    tie_embeddings=False,
)
SEGMENTS = 6
WORLDS = 8
GAMMA = 0.9


@dataclasses.dataclass(frozen=True)
class Setting:
    """A world, a model and the words they have in common."""

    env: Shore
    tokenizer: Tokenizer
    language: Language
    words: Words
    params: LlamaParams
    env_step: Any
    turn_tokens: int
    rollout: RolloutConfig = ROLLOUT
    gamma: float = GAMMA

    def run(self, carry: Carry, schedule: Schedule, **sizes) -> tuple[Carry, Segment]:
        return run_segment(
            self.params,
            carry,
            self.language,
            schedule,
            self.gamma,
            env=self.env,
            config=dataclasses.replace(self.rollout, **sizes),
            model=MODEL,
            budget=PLAN.budget,
            turn_tokens=self.turn_tokens,
        )

    def play(self, schedule: Schedule, segments: int, **sizes) -> "Play":
        carries, played = [self.first_carry(schedule, **sizes)], []
        for _ in range(segments):
            carry, segment = self.run(carries[-1], schedule, **sizes)
            carries.append(carry)
            played.append(segment)
        return Play(schedule=schedule, carries=carries, segments=played)

    def first_carry(self, schedule: Schedule, **sizes) -> Carry:
        config = dataclasses.replace(self.rollout, **sizes)
        key = jax.random.key(0)
        return init_carry(self.env, self.language, schedule, key, config)


@dataclasses.dataclass(frozen=True)
class Play:
    """Some segments in a row: ``carries[i]`` stands before ``segments[i]``."""

    schedule: Schedule
    carries: list[Carry]
    segments: list[Segment]

    def said(self) -> dict[tuple[int, int], list[tuple[int, ...]]]:
        """What was said in each complete turn, for (lane, episode of the lane)."""
        episodes: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for segment in jax.device_get(self.segments):
            tokens, turns = segment.stream.tokens, segment.turns
            for lane, slot in np.argwhere(turns.end.complete):
                is_turn = tokens.turn[lane] == turns.number[lane, slot]
                own = is_turn & (tokens.role[lane] >= Role.DECIDE)
                if own.any():  # nothing is said in sleep
                    episode = int(tokens.episode[lane][own][0])
                    words = tuple(tokens.token[lane][own].tolist())
                    episodes.setdefault((int(lane), episode), []).append(words)
        return episodes


def talkative_params(tokenizer: Tokenizer) -> LlamaParams:
    """A Llama that begins a plan now and then, and often ends it before it must."""
    llama = init_params(jax.random.key(2), MODEL, tokenizer.vocab_size).llama
    # Every hidden state has a share of the all-ones direction: a bias for some logits.
    head = llama.lm_head
    for marker, bias in ((PLAN.open, 1.5), (PLAN.close, 6.0)):
        first = tokenizer.encode(marker)[0]
        head = head.at[:, first].add(bias / MODEL.width)
    return dataclasses.replace(llama, embed=50 * llama.embed + 2.0, lm_head=head)


@pytest.fixture(scope="session")
def setting() -> Setting:
    env, tokenizer = Shore(), load_tokenizer("shipped")
    return Setting(
        env=env,
        tokenizer=tokenizer,
        language=make_language(tokenizer, env, PLAN),
        words=Words(
            opening=tokenizer.encode(PLAN.open),
            closing=tokenizer.encode(PLAN.close),
            actions=[tokenizer.encode(name) for name in env.action_names],
            budget=PLAN.budget,
        ),
        params=talkative_params(tokenizer),
        env_step=jax.jit(env.step),
        turn_tokens=longest_turn(tokenizer, env, PLAN),
    )


@pytest.fixture(scope="session")
def play(setting) -> Play:
    """All modes mixed, and a last lane with only two episodes to play."""
    chance = np.random.default_rng(0)
    shape = (ROLLOUT.num_lanes, 6)
    integers = partial(jnp.asarray, dtype=jnp.int32)
    schedule = Schedule(
        worlds=make_worlds(setting.env, jnp.arange(WORLDS, dtype=jnp.int32)),
        world=integers(chance.integers(0, WORLDS, shape)),
        seed=integers(chance.integers(0, 1000, shape)),
        mode=integers(chance.choice([0, 0, 0, -1, 1, 2], shape)),
        entries=integers([-1] * 5 + [2]),
    )
    return setting.play(schedule, SEGMENTS)
