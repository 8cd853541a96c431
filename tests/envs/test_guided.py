"""Plans that are given: the expert's, in the turns that want one, word by word."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import (
    EnvConfig,
    ModelConfig,
    PlanConfig,
    PogsConfig,
    ProbeConfig,
    RolloutConfig,
)
from jaxplan.core.roles import Span
from jaxplan.envs.base import Intent, Phrases
from jaxplan.envs.guided import GuidedEnv
from jaxplan.envs.worlds import make_env, make_expert
from jaxplan.models.params import init_params
from jaxplan.plan.grammar import guidance, parse_mode
from jaxplan.rollout.lanes import init_lanes, take_advice, world_key
from jaxplan.rollout.play import play_segments
from jaxplan.rollout.rounds import init_carry
from jaxplan.rollout.schedule import episode_key, make_worlds, one_episode_schedule
from jaxplan.rollout.setup import longest_turn, make_language
from jaxplan.rollout.spoken import SpokenTurn, spoken_turns
from jaxplan.text.tokenizer import load_tokenizer
from tests.fakes import Shore

MODEL = ModelConfig(
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_dim=8,
    ffn_width=24,
    tie_embeddings=False,
)
WORLDS = {
    "probe": EnvConfig(name="probe", max_steps=9, probe=ProbeConfig(kinds=("plan",))),
    "pogs": EnvConfig(name="pogs", max_steps=14, pogs=PogsConfig(nodes=8, k_hops=1)),
}
FIRST = 100  # world seed
GUIDED = ("scripted-1", "scripted-3", "scripted-9", "prompted-3")
MODES = (*GUIDED, "dynamic", "never") * 8


@dataclasses.dataclass(frozen=True)
class Watch:
    """Wants another thing every third step of the shore, naps included."""

    phrases: tuple[str, ...] = (" stone", " light", " wood")
    styles: tuple[str, ...] = ("plain",)
    goal_names: tuple[str, ...] = ("stone", "light")

    def init(self):
        return jnp.zeros((), jnp.int32)

    def act(self, key, memory, state):
        del key, state
        wish = Intent(goal=memory // 3 % 2, facts=memory)
        return memory + 1, jnp.zeros((), jnp.int32), wish

    def say(self, key, intent, style):
        del key, style
        ids = jnp.stack([intent.goal, jnp.int32(2)])
        return Phrases(ids=ids, mask=jnp.stack([True, intent.facts % 3 == 0]))


@dataclasses.dataclass(frozen=True)
class Played:
    """Lane b plays world b in mode b (host)."""

    env: GuidedEnv
    seeds: np.ndarray
    worlds: object
    segments: list
    turns: list[list[SpokenTurn]]


def guided(name: str) -> GuidedEnv:
    if name == "shore":
        return GuidedEnv(Shore(max_steps=40), Watch())
    return GuidedEnv(make_env(WORLDS[name]), make_expert(WORLDS[name]))


@pytest.fixture(scope="module", params=["shore", *WORLDS])
def played(request) -> Played:
    tokenizer = load_tokenizer("shipped")
    env = guided(request.param)
    # On the shore segments are short: naps and turns are cut.
    plan = PlanConfig(budget=3 if request.param == "shore" else 40)
    rollout = RolloutConfig(
        num_lanes=len(MODES),
        segment_tokens=384,
        rounds=3 if request.param == "shore" else 16,
        decode_steps=4,
        history=1,
        observation_tokens=96,
    )
    seeds = jnp.arange(FIRST, FIRST + len(MODES), dtype=jnp.int32)
    modes = jnp.array([parse_mode(mode) for mode in MODES])
    schedule = one_episode_schedule(make_worlds(env, seeds), seeds, modes)
    language = make_language(tokenizer, env, plan)
    stream = play_segments(
        init_params(jax.random.key(1), MODEL, tokenizer.vocab_size).llama,
        init_carry(env, language, schedule, jax.random.key(0), rollout),
        language,
        itertools.repeat(schedule),
        env=env,
        config=rollout,
        model=MODEL,
        budget=plan.budget,
        turn_tokens=longest_turn(tokenizer, env, plan),
    )
    segments, ended = [], 0
    while ended < len(MODES):
        segments.append(jax.device_get(next(stream)))
        ended += int(segments[-1].episodes.finished.sum())
    turns = [
        spoken_turns(segments, tokenizer, entry=0, lane=lane)
        for lane in range(len(MODES))
    ]
    return Played(env, np.asarray(seeds), make_worlds(env.env, seeds), segments, turns)


def looked_on(played: Played, lane: int) -> list[tuple[int, str]]:
    """The expert's goal and words in every turn of a lane, from the actions alone."""
    plain, guide = played.env.env, played.env.guide
    world = jax.tree.map(lambda leaf: leaf[lane], played.worlds)
    key, number, memory = episode_key(int(played.seeds[lane])), 0, guide.init()
    act, step, say = jax.jit(guide.act), jax.jit(plain.step), jax.jit(guide.say)
    any_key, found = jax.random.key(5), []
    for turn in played.turns[lane]:
        awake = True
        while awake or plain.passive(world):
            memory, _, intent = act(any_key, memory, world)
            if awake:
                said = say(any_key, intent, jnp.int32(0))
                words = "".join(guide.phrases[i] for i in said.ids[said.mask])
                found.append((int(intent.goal), words.strip()))
            awake = False
            result = step(world_key(key, jnp.int32(number)), world, turn.action)
            world, number = result.state, number + 1
            if bool(result.terminated | result.truncated):
                return found
    raise AssertionError("the episode has no end")


@pytest.mark.parametrize("mode", GUIDED)
def test_the_plans_are_the_experts(played, mode):
    """In the first turn, where its goal is another, and after K turns."""
    who, every = mode.split("-")[0], int(mode.split("-")[1])
    for lane in np.flatnonzero(np.array(MODES) == mode):
        told, goal, since, count = played.turns[lane], None, 0, 0
        for turn, (now, words) in zip(told, looked_on(played, lane), strict=True):
            due = now != goal or since >= every
            assert bool(turn.plan) == due
            assert who == "prompted" or turn.plan == (words if due else "")
            goal, since = now, 1 if due else since + 1
            count += due
        assert count
        assert every > 1 or count == len(told)


def test_nothing_of_a_plan_given_is_sampled(played):
    given, own = (np.array([m.startswith(s) for m in MODES]) for s in ("scr", "pro"))
    sampled = 0
    for segment in played.segments:
        tokens = segment.stream.tokens
        text = tokens.span == Span.PLAN
        assert not tokens.sampled[text & given[:, None]].any()
        assert not tokens.log_prob[text & given[:, None]].any()
        sampled += tokens.sampled[text & own[:, None]].sum()
    assert sampled  # the words of who is only prompted


def test_actions_and_other_modes_stay_the_agents(played):
    for segment in played.segments:
        tokens = segment.stream.tokens
        acts = (tokens.span == Span.ACTION) & tokens.sampled
        assert (tokens.log_prob[acts] < 0).all()
    assert not any(turn.plan for turn in played.turns[MODES.index("never")])
    words = {words for _, words in looked_on(played, MODES.index("dynamic"))}
    own = {turn.plan for turn in played.turns[MODES.index("dynamic")] if turn.plan}
    assert not own & words


def test_the_account_counts_plans_given(played):
    ends = [s.episodes for s in played.segments]
    plans = sum(np.where(e.finished, e.stats.plans, 0).sum(axis=0) for e in ends)
    told = [sum(turn.plan != "" for turn in turns) for turns in played.turns]
    np.testing.assert_array_equal(plans, told)


@pytest.mark.parametrize("every", [1, 2, 12])
def test_modes_are_read(every):
    def read(mode):
        return [int(told) for told in guidance(jnp.int32(parse_mode(mode)))]

    assert read(f"scripted-{every}") == [1, 1, every]
    assert read(f"prompted-{every}") == [1, 0, every]
    assert not any(read(mode)[0] for mode in ("dynamic", "never", f"every-{every}"))
    with pytest.raises(ValueError, match="scripted-K"):
        parse_mode("scripted")


@pytest.mark.parametrize(
    ("phrases", "budget", "sentence"),
    [
        ((" stone", " iron > coal"), 9, "' iron > coal' is no plan text"),
        ((" stone", " zymurgy"), 1, "plan.budget=1 is too small .* ' zymurgy'"),
    ],
)
def test_a_guide_whose_words_no_plan_may_have_is_refused(phrases, budget, sentence):
    """A lane that is dictated them would never come to its action."""
    env = GuidedEnv(Shore(), Watch(phrases=phrases))
    with pytest.raises(ValueError, match=sentence):
        make_language(load_tokenizer("shipped"), env, PlanConfig(budget=budget))


@pytest.mark.parametrize("asleep", [True, False])
def test_a_plan_is_not_given_in_sleep(asleep):
    """It would be lost: the turn goes on where the next segment begins."""
    env, seeds = guided("shore"), jnp.arange(1, dtype=jnp.int32)
    modes = jnp.array([parse_mode("scripted-1")])
    schedule = one_episode_schedule(make_worlds(env, seeds), seeds, modes)
    lanes = init_lanes(env, schedule, jax.random.key(0), 1)
    lane = jax.tree.map(lambda leaf: leaf[0], lanes)
    lane = dataclasses.replace(
        lane, mode=modes[0], episode_turn=jnp.int32(4), asleep=jnp.array(asleep)
    )
    given = take_advice(lane, env, jnp.array(True)).given
    assert int(given.turn) == (0 if asleep else 4)
    assert bool(given.plan.mask.any()) is not asleep
