"""Frames of a replay against the account that was kept while the agent played."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxplan.config.schema import (
    EnvConfig,
    EvaluateConfig,
    ModelConfig,
    PlanConfig,
    RolloutConfig,
)
from jaxplan.envs.worlds import make_env
from jaxplan.eval.panels import Panel, play_panel
from jaxplan.eval.replay import make_replay
from jaxplan.models.params import init_params
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.rollout.spoken import spoken_turns
from jaxplan.text.tokenizer import load_tokenizer

PLAN = PlanConfig(budget=3)
MODEL = ModelConfig(
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_width=24,
    tie_embeddings=False,
)
STEPS, SEED = 60, 10_000


@pytest.fixture(scope="module")
def played():
    """Two modes on two worlds of Craftax; lane 0 plays the first world, dynamically."""
    tokenizer = load_tokenizer("shipped")
    env = make_env(EnvConfig(max_steps=STEPS))
    panel = Panel(
        env=env,
        config=EvaluateConfig(
            episodes=2, modes=("dynamic", "never"), seed=SEED, max_steps=STEPS
        ),
        rollout=RolloutConfig(
            num_lanes=2,
            segment_tokens=256,
            rounds=8,
            decode_steps=3,
            history=2,
            observation_tokens=40,
        ),
        model=MODEL,
        budget=PLAN.budget,
        turn_tokens=longest_turn(tokenizer, env, PLAN),
    )
    llama = init_params(jax.random.key(1), MODEL, tokenizer.vocab_size).llama
    # All hidden states share the all-ones direction: a bias for going to sleep, which
    # a player can when it has become tired.
    sleep = tokenizer.encode("Sleep")[0]
    llama = dataclasses.replace(
        llama,
        embed=50 * llama.embed + 2.0,
        lm_head=llama.lm_head.at[:, sleep].add(2.0 / MODEL.width),
    )
    listed = panel.listed()
    episodes, segments = play_panel(
        llama,
        panel,
        make_language(tokenizer, env, PLAN),
        listed,
        lambda done, env_steps: None,
    )
    turns = spoken_turns(segments, tokenizer, entry=0)
    world = jax.tree.map(lambda leaf: leaf[0], listed.worlds)
    replay = make_replay("arm", "dynamic", SEED, world, turns, env)
    return replay, turns, episodes.of_mode(0), env


@pytest.mark.slow
def test_a_replay_earns_what_the_episode_earned(played):
    replay, _, account, env = played
    frames = replay["frames"]
    assert len(frames) == account.env_steps[0]
    rewards = sum(frame["reward"] for frame in frames)
    np.testing.assert_allclose(rewards, account.task_return[0], atol=1e-3)
    unlocked = {name for frame in frames for name in frame["unlocked"]}
    expected = {
        name
        for name, got in zip(env.event_names, account.events[0], strict=True)
        if got
    }
    assert unlocked == expected
    assert frames[-1]["achievements"] == len(expected)


@pytest.mark.slow
def test_a_replay_shows_every_turn_once(played):
    replay, turns, account, env = played
    frames = replay["frames"]
    fresh = [frame for frame in frames if frame["observation"]]
    assert [frame["observation"] for frame in fresh] == [t.observation for t in turns]
    assert [frame["action"] for frame in fresh] == [
        env.action_names[turn.action] for turn in turns
    ]
    said = [turn.plan for turn in turns if turn.plan]
    assert len(said) == account.plans[0]
    assert [frame["plan"] for frame in frames if frame["planned_now"]] == said
    assert [frame["step"] for frame in frames] == list(range(len(frames)))


@pytest.mark.slow
def test_frames_agree_with_what_was_said_of_them(played):
    """The text and the frame are made from the same world by different code."""
    replay = played[0]
    assert any(frame["sleeping"] for frame in replay["frames"])
    for frame in replay["frames"]:
        assert len(frame["view"]) == 7
        assert all(len(row) == 9 for row in frame["view"])
        assert frame["vitals"].keys() >= {"health"}
        if frame["observation"]:
            assert frame["sleeping"] == ("sleep" in frame["observation"].lower())
