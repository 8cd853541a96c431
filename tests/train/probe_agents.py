"""Tiny agents for the probe worlds, and what is read off their play."""

import dataclasses
from pathlib import Path

import numpy as np

from jaxplan.config.schema import (
    EnvConfig,
    ModelConfig,
    OptimizerConfig,
    PlanConfig,
    PpoConfig,
    ProbeConfig,
    RoleCoefficients,
    RolloutConfig,
    RunConfig,
)
from jaxplan.envs.probes import KINDS
from jaxplan.envs.worlds import make_env
from jaxplan.rollout.setup import check_sizes, longest_turn, make_language
from jaxplan.text.tokenizer import load_tokenizer
from jaxplan.train.population import make_common

TOKENIZER = load_tokenizer(
    str(Path(__file__).parents[2] / "configs/experiments/estimators/tokenizer.json")
)
ROLLOUT = RolloutConfig(
    num_lanes=32,
    segment_tokens=104,
    rounds=12,
    prefill_tokens=4,
    decode_steps=3,  # with the token before them: <plan>, a word, </plan>, the action
    history=1,
    observation_tokens=3,
)
MODEL = ModelConfig(
    width=16, layers=1, heads=2, kv_heads=2, head_dim=8, ffn_width=32, remat="none"
)
NO_KL = RoleCoefficients()  # nobody taught these agents anything to keep


def agents(kinds, learning_rate=1e-2, layers=1, history=1, **ppo):
    """The language and the rest of what a population has in common.

    With two layers what the model keeps of an observation at a plan can be read off the
    plan later on; with one, its words alone can.
    """
    config = RunConfig(
        env=EnvConfig(
            name="probe", probe=ProbeConfig(kinds=kinds), max_steps=9, pool_size=64
        ),
        plan=PlanConfig(budget=1),
        model=dataclasses.replace(MODEL, layers=layers),
        rollout=dataclasses.replace(ROLLOUT, history=history),
        ppo=PpoConfig(
            gamma=0.9,
            kl_coef=NO_KL,
            optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_updates=8),
            **ppo,
        ),
    )
    world = make_env(config.env)
    language = make_language(TOKENIZER, world, config.plan)
    turn_tokens = longest_turn(TOKENIZER, world, config.plan)
    check_sizes(language, config.rollout, config.plan, turn_tokens)
    return language, make_common(config, world, turn_tokens)


def _ids(*words):
    return [TOKENIZER.encode(word)[0] for word in words]


_SIGNS = _ids(" west", " east")
_STAKES = _ids(" wood", " stone", " iron", " diamond")
_NUMBERS = _ids(*(f" {number}:" for number in range(len(KINDS))))


def observed(segment):
    """What stands before each turn: kind, stake and sign; -1 where it is not there."""
    tokens, place = segment.stream.tokens.token, segment.turns.start - 1
    found = []
    for words in (_SIGNS, _STAKES, _NUMBERS):
        word = np.take_along_axis(tokens, np.maximum(place, 0), axis=-1)
        which = np.select([word == one for one in words], range(len(words)), -1)
        found.append(which)
        place = np.where(which < 0, place, place - 1)
    sign, stake, kind = found
    return kind, stake, sign
