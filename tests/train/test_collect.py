"""The teacher's dataset against a play in plain Python."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxplan.config.schema import CollectConfig
from jaxplan.envs.base import Intent, Phrases
from jaxplan.io.datasets import read_card, read_dataset
from jaxplan.io.stopping import Stopped, StopRequest
from jaxplan.rollout.lanes import world_key
from jaxplan.rollout.schedule import episode_key, make_worlds
from jaxplan.text.phrases import phrases_text
from jaxplan.train.collect import ExpertTeacher, collect, speaking_turns
from jaxplan.train.scribe import Desk
from tests.fakes import Shore

CONFIG = CollectConfig(
    episodes=5, lanes=2, steps=9, plan_every=(2, 3), action_noise=0.3
)


@dataclasses.dataclass(frozen=True)
class Guide:
    """Walks east, naps now and then, and says which."""

    phrases: tuple[str, ...] = (" go", " stone", " light", " so")
    styles: tuple[str, ...] = ("plain", "wordy")
    goal_names: tuple[str, ...] = ("walk", "nap")

    def init(self):
        return jnp.zeros((), jnp.int32)

    def act(self, key, memory, state):
        del key
        naps = memory % 3 == 2
        action = jnp.where(naps, 3, jnp.where(state.place < 3, 2, 1))
        return memory + 1, action, Intent(goal=naps.astype(int), facts=state.place)

    def say(self, key, intent, style):
        """The wordy style says "so" at times, by the key."""
        so = (style == 1) & jax.random.bernoulli(key)
        mask = [jnp.array(True), intent.facts > 1, intent.goal > 0, so]
        return Phrases(ids=jnp.arange(4), mask=jnp.stack(mask))


@pytest.fixture(scope="module")
def desk(setting):
    return Desk(
        env=setting.env,
        tokenizer=setting.tokenizer,
        config=CONFIG,
        seed=7,
        observation_tokens=12,
        plan_tokens=setting.plan.budget,
    )


def run(directory: Path, desk, stop=None, **changes):
    desk = dataclasses.replace(desk, config=dataclasses.replace(CONFIG, **changes))
    about = {"tokenizer": desk.tokenizer.sha256, "env": "shore", "text": "plain"}
    about |= {"teacher": "guide", "config": "{}"}
    told = []
    card = collect(
        directory,
        ExpertTeacher(Guide(), desk),
        about,
        lambda *progress: told.append(progress),
        stop or StopRequest(),
    )
    return card, told


@pytest.fixture(scope="module")
def table(tmp_path_factory, desk):
    directory = tmp_path_factory.mktemp("dataset")
    run(directory, desk)
    return read_dataset(directory, desk.tokenizer)


def episodes_of(table):
    rows = table.to_pylist()
    return [
        [row for row in rows if row["episode"] == episode]
        for episode in range(CONFIG.episodes)
    ]


def find_seed(number):
    """The world of trajectory ``number`` of run 7."""
    return int(np.random.default_rng([7, number]).integers(2**24, 2**30))


def play_in_python(desk, number, turns):
    """Play a trajectory's own actions again, step by step."""
    env, expert = desk.env, Guide()
    actions = {turn["step"]: turn["action_id"] for turn in turns}
    seed = jnp.array([find_seed(number)], jnp.int32)
    world = jax.tree.map(lambda leaf: leaf[0], make_worlds(env, seed))
    key = episode_key(seed[0])
    env_step, act = jax.jit(env.step), jax.jit(expert.act)
    memory, over, steps = expert.init(), False, []
    for number in range(CONFIG.steps):
        if over:
            break
        memory, wanted, intent = act(key, memory, world)
        plan = expert.say(key, intent, jnp.int32(0))
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
                "goal": expert.goal_names[int(intent.goal)],
                "wanted": int(wanted),
                "reward": float(result.reward),
                "events": int(result.events.sum()),
            }
        )
        world, over = result.state, bool(result.terminated | result.truncated)
    return steps


@pytest.fixture(scope="module")
def plays(table, desk):
    return [
        (turns, play_in_python(desk, number, turns))
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


def test_what_is_seen_and_done_is_written_down(plays, desk):
    for turns, steps in plays:
        for turn in turns:
            step = steps[turn["step"]]
            assert turn["observation"] == step["observation"]
            assert turn["observation_tokens"] == desk.tokenizer.encode(
                turn["observation"]
            )
            assert turn["goal"] == step["goal"]
            assert turn["style"] == "plain"
            assert not turn["asleep"]
            assert turn["action"] == desk.env.action_names[turn["action_id"]]
            assert turn["action_tokens"] == desk.tokenizer.encode(turn["action"])


def test_what_is_learnt_is_what_the_expert_wanted(plays):
    turns = [turn for turns, _ in plays for turn in turns]
    assert {turn["advice"] == "" for turn in turns} == {True, False}, "some is noise"
    for turns, steps in plays:
        for turn in turns:
            wanted = Shore.action_names[steps[turn["step"]]["wanted"]]
            assert turn["learn"]
            assert (turn["advice"] or turn["action"]) == wanted
            assert turn["advice"] != turn["action"]


def test_a_turn_earns_what_is_earned_until_the_next(plays):
    for turns, steps in plays:
        ends = [turn["step"] for turn in turns[1:]] + [len(steps)]
        for turn, end in zip(turns, ends, strict=True):
            own = steps[turn["step"] : end]
            total = sum(step["reward"] for step in own)
            np.testing.assert_allclose(turn["reward"], total, rtol=1e-5)
            so_far = sum(step["events"] for step in steps[:end])
            assert turn["achievements"] == so_far


def test_plans_are_said_every_few_turns_from_the_first_on(plays, desk):
    for turns, steps in plays:
        said = [turn["turn"] for turn in turns if turn["plan"]]
        every = said[1] if len(said) > 1 else 2
        low, high = CONFIG.plan_every
        assert low <= every <= high
        assert said == list(range(0, len(turns), every))
        for turn in turns:
            if turn["plan"]:
                assert turn["plan"] == steps[turn["step"]]["plan"]
            expected = desk.tokenizer.encode(turn["plan"])
            assert turn["plan_tokens"] == expected[: desk.plan_tokens]


@pytest.mark.parametrize(
    ("every", "first", "on_change", "speaks"),
    [
        (3, 0, False, "x..x..x"),
        (3, 2, False, "..x..x."),
        (3, 0, True, "x.xx..x"),
        (9, 0, True, "x.xx..."),
        (9, 1, True, ".xxx..."),
    ],
)
def test_plans_are_due_by_count_and_by_change(every, first, on_change, speaks):
    found = speaking_turns([4, 4, 5, 6, 6, 6, 6], every, first, on_change)
    assert "".join(".x"[int(due)] for due in found) == speaks


def test_a_plan_may_also_be_said_at_a_new_goal(tmp_path, desk):
    run(tmp_path, desk, replan_on_change=True, plan_every=(4, 4))
    said_early = 0
    for turns in episodes_of(read_dataset(tmp_path, desk.tokenizer)):
        last = None
        for turn in turns:
            waited = last is None or turn["turn"] - last["turn"] == 4
            changed = last is not None and turn["goal"] != last["goal"]
            assert (turn["plan"] != "") == (waited or changed)
            said_early += changed and not waited
            last = turn if turn["plan"] else last
    assert said_early


def test_the_first_plan_may_come_in_any_of_the_first_turns(tmp_path, desk):
    run(tmp_path, desk, random_phase=True, plan_every=(4, 4), episodes=8)
    rows = read_dataset(tmp_path, desk.tokenizer).to_pylist()
    first = {}
    for row in rows:
        if row["plan"]:
            first.setdefault(row["episode"], row["turn"])
            assert row["turn"] % 4 == first[row["episode"]] < 4
    assert len(set(first.values())) > 1


def test_a_trajectory_may_end_before_its_first_plan(tmp_path, desk):
    run(tmp_path, desk, random_phase=True, plan_every=(20, 20), episodes=8)
    rows = read_dataset(tmp_path, desk.tokenizer).to_pylist()
    silent = {row["episode"] for row in rows} - {
        row["episode"] for row in rows if row["plan"]
    }
    assert silent, "some of eight trajectories of 9 steps say nothing at all"
    assert all(row["plan_tokens"] == [] for row in rows if row["episode"] in silent)


def test_styles_are_drawn_by_trajectory_and_wordings_by_plan(tmp_path, desk):
    card, _ = run(tmp_path, desk, episodes=8, styles=("plain", "wordy"))
    rows = read_dataset(tmp_path, desk.tokenizer).to_pylist()
    styles = {row["episode"]: row["style"] for row in rows}
    assert set(styles.values()) == set(card["styles"]) == {"plain", "wordy"}
    assert all(row["style"] == styles[row["episode"]] for row in rows)
    said = {
        style: {" so" in row["plan"] for row in rows if row["plan"] and
                row["style"] == style}
        for style in ("plain", "wordy")
    }  # fmt: skip
    assert said == {"plain": {False}, "wordy": {False, True}}


def test_an_unknown_style_is_refused_before_anything_is_written(tmp_path, desk):
    with pytest.raises(ValueError, match=r"\['rhymed'\].*it has plain, wordy"):
        run(tmp_path / "new", desk, styles=("plain", "rhymed"))
    assert not (tmp_path / "new").exists()


def test_sleeping_turns_are_kept_if_wanted_and_rewards_are_split(tmp_path, desk, table):
    card, _ = run(tmp_path, desk, sleeping=1.0)
    kept = episodes_of(read_dataset(tmp_path, desk.tokenizer))
    assert card["asleep_share"] > 0.1
    for turns, awake in zip(kept, episodes_of(table), strict=True):
        assert [turn["step"] for turn in turns] == list(range(len(turns)))
        total = sum(turn["reward"] for turn in awake)
        np.testing.assert_allclose(sum(turn["reward"] for turn in turns), total, 1e-5)
        awake_steps = [turn["step"] for turn in turns if not turn["asleep"]]
        assert awake_steps == [turn["step"] for turn in awake]


def test_other_texts_and_no_token_ids_if_wanted(tmp_path, desk, table):
    loud = Shore(phrases=("\nAT", " STONE", " LIGHT", " ASLEEP"))
    run(
        tmp_path,
        dataclasses.replace(desk, other_texts={"loud": loud}),
        token_ids=False,
    )
    shards = [pq.read_table(path) for path in sorted(tmp_path.glob("*.parquet"))]
    for row in pa.concat_tables(shards).to_pylist():
        assert row["observation_loud"] == row["observation"].upper()
        assert row["observation_tokens"] == row["plan_tokens"] == []
    other = dataclasses.replace(desk.tokenizer, sha256="another")
    again = read_dataset(tmp_path, other)
    assert again["observation_tokens"].equals(table["observation_tokens"])


def test_without_noise_everything_is_learnt(tmp_path, desk):
    card, _ = run(tmp_path, desk, episodes=2, action_noise=0.0)
    assert card["learn_share"] == 1.0


class StopAtOnce(StopRequest):
    def __init__(self):
        self._asked = True


def test_a_stopped_collection_goes_on_to_the_same_dataset(tmp_path, desk, table):
    for _ in range(2):
        with pytest.raises(Stopped):
            run(tmp_path, desk, stop=StopAtOnce())
        assert not (tmp_path / "card.json").exists()
    _, told = run(tmp_path, desk)
    assert [done for done, _ in told] == [5]
    assert read_dataset(tmp_path, desk.tokenizer).equals(table)
    assert read_card(tmp_path)["episodes"] == 5
