"""The teacher's dataset against a play in plain Python."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxplan.config.schema import CollectConfig
from jaxplan.envs.base import Phrases
from jaxplan.io.datasets import read_card, read_dataset
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key, make_worlds
from jaxplan.text.phrases import phrases_text
from jaxplan.train.collect import Teacher, collect

CONFIG = CollectConfig(
    episodes=5, lanes=2, steps=9, plan_every=(2, 3), action_noise=0.3
)


@dataclasses.dataclass(frozen=True)
class Guide:
    """Walks east, naps now and then, and says which."""

    phrases: tuple[str, ...] = (" go", " stone", " light")

    def init(self):
        return jnp.zeros((), jnp.int32)

    def act(self, key, memory, state):
        del key
        naps = memory % 3 == 2
        action = jnp.where(naps, 3, jnp.where(state.place < 3, 2, 1))
        mask = jnp.stack([jnp.array(True), state.place > 1, naps])
        return memory + 1, action, Phrases(ids=jnp.arange(3), mask=mask)


@pytest.fixture(scope="module")
def teacher(setting):
    return Teacher(
        env=setting.env,
        expert=Guide(),
        tokenizer=setting.tokenizer,
        observation_tokens=12,
        plan_tokens=setting.plan.budget,
    )


def run(directory: Path, teacher, stop=None, config=CONFIG):
    about = {"tokenizer": "sha", "env": "shore", "text": "plain", "config": "{}"}
    told = []
    card = collect(
        directory,
        teacher,
        config,
        7,
        about,
        lambda *progress: told.append(progress),
        stop or StopRequest(),
    )
    return card, told


@pytest.fixture(scope="module")
def table(tmp_path_factory, teacher):
    directory = tmp_path_factory.mktemp("dataset")
    run(directory, teacher)
    return read_dataset(directory, "sha")


def episodes_of(table):
    rows = table.to_pylist()
    return [
        [row for row in rows if row["episode"] == episode]
        for episode in range(CONFIG.episodes)
    ]


def find_seed(number):
    """The world of trajectory ``number`` of run 7."""
    return int(np.random.default_rng([7, number]).integers(2**24, 2**30))


def play_in_python(teacher, number, turns):
    """Play a trajectory's own actions again, step by step."""
    env, expert = teacher.env, teacher.expert
    actions = {turn["step"]: turn["action_id"] for turn in turns}
    seed = jnp.array([find_seed(number)], jnp.int32)
    world = jax.tree.map(lambda leaf: leaf[0], make_worlds(env, seed))
    key = episode_key(seed[0])
    env_step, act = jax.jit(env.step), jax.jit(expert.act)
    memory, over, steps = expert.init(), False, []
    for number in range(CONFIG.steps):
        if over:
            break
        memory, wanted, plan = act(key, memory, world)
        seen = env.describe(world)
        passive = bool(env.passive(world))
        action = 0 if passive else actions[number]
        result = env_step(world_key(key, jnp.int32(number)), world, jnp.int32(action))
        steps.append(
            {
                "step": number,
                "passive": passive,
                "observation": phrases_text(
                    env.phrases, np.asarray(seen.ids), np.asarray(seen.mask)
                ),
                "plan": phrases_text(
                    expert.phrases, np.asarray(plan.ids), np.asarray(plan.mask)
                ),
                "wanted": int(wanted),
                "reward": float(result.reward),
                "events": int(result.events.sum()),
            }
        )
        world, over = result.state, bool(result.terminated | result.truncated)
    return steps


@pytest.fixture(scope="module")
def plays(table, teacher):
    return [
        (turns, play_in_python(teacher, number, turns))
        for number, turns in enumerate(episodes_of(table))
    ]


def test_the_play_was_worth_checking(plays):
    steps = [step for _, played in plays for step in played]
    assert len(steps) > 25
    assert any(step["passive"] for step in steps)
    assert sum(step["events"] for step in steps) > 3


def test_turns_are_the_steps_in_which_the_player_is_awake(plays):
    for turns, steps in plays:
        awake = [step["step"] for step in steps if not step["passive"]]
        assert [turn["step"] for turn in turns] == awake
        assert [turn["turn"] for turn in turns] == list(range(len(awake)))


def test_what_is_seen_and_done_is_written_down(plays, teacher):
    for turns, steps in plays:
        for turn in turns:
            step = steps[turn["step"]]
            assert turn["observation"] == step["observation"]
            assert turn["observation_tokens"] == teacher.tokenizer.encode(
                turn["observation"]
            )
            assert turn["action"] == teacher.env.action_names[turn["action_id"]]
            assert turn["action_tokens"] == teacher.tokenizer.encode(turn["action"])


def test_what_is_learnt_is_what_the_expert_wanted(plays):
    turns = [turn for turns, _ in plays for turn in turns]
    assert {turn["learn"] for turn in turns} == {True, False}
    for turns, steps in plays:
        for turn in turns:
            if turn["learn"]:
                assert turn["action_id"] == steps[turn["step"]]["wanted"]


def test_a_turn_earns_what_is_earned_until_the_next(plays):
    for turns, steps in plays:
        ends = [turn["step"] for turn in turns[1:]] + [len(steps)]
        for turn, end in zip(turns, ends, strict=True):
            own = steps[turn["step"] : end]
            total = sum(step["reward"] for step in own)
            np.testing.assert_allclose(turn["reward"], total, rtol=1e-5)
            so_far = sum(step["events"] for step in steps[:end])
            assert turn["achievements"] == so_far


def test_plans_are_said_every_few_turns_from_the_first_on(plays, teacher):
    for turns, steps in plays:
        said = [turn["turn"] for turn in turns if turn["plan"]]
        every = said[1] if len(said) > 1 else 2
        low, high = CONFIG.plan_every
        assert low <= every <= high
        assert said == list(range(0, len(turns), every))
        for turn in turns:
            if turn["plan"]:
                assert turn["plan"] == steps[turn["step"]]["plan"]
            expected = teacher.tokenizer.encode(turn["plan"])
            assert turn["plan_tokens"] == expected[: teacher.plan_tokens]


def test_without_noise_everything_is_learnt(tmp_path, teacher):
    config = dataclasses.replace(CONFIG, episodes=2, action_noise=0.0)
    card, _ = run(tmp_path, teacher, config=config)
    assert card["learn_share"] == 1.0


class StopAtOnce(StopRequest):
    def __init__(self):
        self.requested = True


def test_a_stopped_collection_goes_on_to_the_same_dataset(tmp_path, teacher, table):
    for _ in range(2):
        with pytest.raises(Stopped):
            run(tmp_path, teacher, stop=StopAtOnce())
        assert not (tmp_path / "card.json").exists()
    _, told = run(tmp_path, teacher)
    assert [done for done, _ in told] == [5]
    assert read_dataset(tmp_path, "sha").equals(table)
    assert read_card(tmp_path)["episodes"] == 5
