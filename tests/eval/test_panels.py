"""A panel of a tiny agent: everyone plays every world once, in every mode."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import (
    EvaluateConfig,
    ModelConfig,
    PlanConfig,
    RolloutConfig,
)
from jaxplan.eval.panels import (
    Episodes,
    Panel,
    by_episode,
    make_probe,
    play_panel,
    result_of,
)
from jaxplan.eval.scripted import play_scripted_panel
from jaxplan.models.params import init_params
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.rounds import run_segment
from jaxplan.rollout.schedule import episode_key
from jaxplan.rollout.scripted import RandomPlayer
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.rollout.spoken import spoken_turns
from jaxplan.text.tokenizer import load_tokenizer
from tests.fakes import Shore

PLAN = PlanConfig(open="{plan}", close="<end>", budget=3)
MODEL = ModelConfig(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_width=24)
MODES = ("dynamic", "never", "every-2")
SEED = 1000


@dataclasses.dataclass(frozen=True)
class Played:
    panel: Panel
    listed: object
    episodes: Episodes
    segments: list
    told: list


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("shipped")


@pytest.fixture(scope="module")
def panel(tokenizer) -> Panel:
    env = Shore(max_steps=6)
    return Panel(
        env=env,
        config=EvaluateConfig(episodes=5, modes=MODES, seed=SEED, max_steps=6),
        rollout=RolloutConfig(
            num_lanes=2,
            segment_tokens=96,
            rounds=8,
            decode_steps=3,
            history=2,
            observation_tokens=8,
        ),
        model=MODEL,
        budget=PLAN.budget,
        turn_tokens=longest_turn(tokenizer, env, PLAN),
    )


@pytest.fixture(scope="module")
def played(panel, tokenizer) -> Played:
    params = init_params(jax.random.key(1), MODEL, tokenizer.vocab_size).llama
    listed, told = panel.listed(), []
    episodes, segments = play_panel(
        params,
        panel,
        make_language(tokenizer, panel.env, PLAN),
        listed,
        lambda *progress: told.append(progress),
    )
    return Played(panel, listed, episodes, segments, told)


def test_every_world_is_played_once_in_every_mode(played):
    for mode in range(len(MODES)):
        episodes = played.episodes.of_mode(mode)
        assert (episodes.mode == mode).all()
        assert episodes.seed.tolist() == list(range(SEED, SEED + 5))
    assert len(played.episodes.seed) == 15


def test_episodes_are_the_same_in_many_lanes_and_then_in_fewer(played, tokenizer):
    panel, before = played.panel, run_segment._cache_size()
    many = dataclasses.replace(panel.rollout, num_lanes=32)
    params = init_params(jax.random.key(1), MODEL, tokenizer.vocab_size).llama
    episodes, _ = play_panel(
        params,
        dataclasses.replace(panel, rollout=many),
        make_language(tokenizer, panel.env, PLAN),
        played.listed,
        lambda *_: None,
    )
    assert run_segment._cache_size() == before + 2, "32 lanes, and then 8"
    for mode in range(len(MODES)):
        jax.tree.map(
            np.testing.assert_array_equal,
            vars(episodes.of_mode(mode)),
            vars(played.episodes.of_mode(mode)),
        )


def test_progress_counts_episodes_and_env_steps(played):
    assert played.told[-1] == (15, int(played.episodes.env_steps.sum()))
    assert played.told == sorted(played.told)


def test_a_probe_tells_the_means_of_such_a_panel(played, panel, tokenizer):
    language = make_language(tokenizer, panel.env, PLAN)
    params = init_params(jax.random.key(1), MODEL, tokenizer.vocab_size).llama
    probe = make_probe(panel, language)
    told, episodes = probe(params), played.episodes
    assert told == probe(params)
    assert told["panel/achievements"] == episodes.events.sum(axis=1).mean()
    assert told["panel/return"] == pytest.approx(episodes.task_return.mean())
    assert told["panel/alive"] == (~episodes.terminated).mean()
    assert 0 < told["panel/plan_rate"] < 1


def test_episodes_are_kept_as_plain_data(played):
    kept = by_episode(played.episodes)
    assert json.loads(json.dumps(kept)) == kept
    assert kept["seed"] == played.episodes.seed.tolist()
    counts = [len(events) for events in kept["unlocked"]]
    assert counts == played.episodes.events.sum(axis=1).tolist()


def test_modes_plan_when_they_say(played):
    never, every = (played.episodes.of_mode(mode) for mode in (1, 2))
    assert never.plans.sum() == never.plan_tokens.sum() == 0
    np.testing.assert_array_equal(every.plans, (every.turns + 1) // 2)
    assert (every.plan_tokens >= every.plans).all()


def test_episodes_end_by_death_or_by_the_time_limit(played):
    episodes = played.episodes
    np.testing.assert_array_equal(episodes.env_steps[~episodes.terminated], 6)
    assert (episodes.env_steps <= 6).all()
    assert (episodes.turns <= episodes.env_steps).all()


def test_the_words_of_an_episode_play_it_again(played, tokenizer):
    """Lane 0 begins with the first world, in the first mode."""
    turns = spoken_turns(played.segments, tokenizer, entry=0)
    env, account = played.panel.env, played.episodes.of_mode(0)
    world = jax.tree.map(lambda leaf: leaf[0], played.listed.worlds)
    step, describe = jax.jit(env.step), jax.jit(env.describe)
    key, total, number, plans = episode_key(SEED), 0.0, 0, 0
    for turn in turns:
        seen = describe(world)
        text = "".join(env.phrases[i] for i in seen.ids[seen.mask])
        assert turn.observation == text.strip()
        plans += turn.plan != ""
        awake = True
        while awake or env.passive(world):
            awake = False
            result = step(world_key(key, jnp.int32(number)), world, turn.action)
            world, number = result.state, number + 1
            total += float(result.reward)
            over = bool(result.terminated | result.truncated)
            if over:
                break
    assert over
    assert number == account.env_steps[0]
    assert plans == account.plans[0]
    assert bool(result.terminated) == account.terminated[0]
    np.testing.assert_allclose(total, account.task_return[0], rtol=1e-5)
    np.testing.assert_array_equal(world.seen, account.events[0])


def test_what_progress_raises_ends_the_panel(panel, tokenizer):
    class Enough(Exception):  # noqa: N818 (not an error)
        pass

    def enough(done, env_steps):
        raise Enough

    params = init_params(jax.random.key(1), MODEL, tokenizer.vocab_size).llama
    language = make_language(tokenizer, panel.env, PLAN)
    with pytest.raises(Enough):
        play_panel(params, panel, language, panel.listed(), enough)


def test_a_scripted_player_meets_the_same_worlds(panel):
    player, told = RandomPlayer(len(panel.env.action_names)), []
    play = play_scripted_panel(panel, player, lambda *done: told.append(done))
    episodes = play.episodes
    assert [done for done, _ in told] == [2, 4, 5]
    assert told[-1][1] == episodes.env_steps.sum()
    assert ((play.goals >= 0).sum(axis=0) == episodes.env_steps).all()
    np.testing.assert_array_equal(play.unlocked >= 0, episodes.events)
    assert episodes.seed.tolist() == list(range(SEED, SEED + 5))
    assert (episodes.env_steps[~episodes.terminated] == 6).all()
    assert episodes.plans.sum() == 0
    again = play_scripted_panel(panel, player, lambda *done: None)
    np.testing.assert_array_equal(episodes.task_return, again.episodes.task_return)


def test_a_result_is_the_mean_over_episodes():
    episodes = Episodes(
        mode=np.zeros(2, int),
        seed=np.array([1, 2]),
        task_return=np.array([1.0, 3.0]),
        events=np.array([[True, False], [True, True]]),
        counts={"stumbles": np.array([0, 3])},
        env_steps=np.array([10, 20]),
        turns=np.array([4, 0]),
        plans=np.array([1, 0]),
        plan_tokens=np.array([8, 0]),
        terminated=np.array([True, False]),
    )
    row = result_of("arm", "never", episodes, ("dune", "nap"), 0.9)
    assert row["arm"] == "arm"
    assert row["mode"] == "never"
    means = {name: row[name]["mean"] for name in ("achievements", "return", "steps")}
    assert means == {"achievements": 1.5, "return": 2.0, "steps": 15.0}
    assert row["counts"]["stumbles"]["mean"] == 1.5
    assert row["alive"]["mean"] == 0.5
    assert row["plan_rate"]["mean"] == 0.125
    assert row["plan_tokens_per_turn"]["mean"] == 1.0
