"""From a dataset's table to segments: which episodes, which tokens."""

import numpy as np
import pyarrow as pa
import pytest

from jaxplan.config.schema import RolloutConfig, SftConfig
from jaxplan.core.roles import Role
from jaxplan.io.datasets import SCHEMA
from jaxplan.train.data import load_segments


@pytest.fixture(scope="module")
def turns(setting):
    """Twenty episodes of two turns, the first with a plan, each with its own word."""
    plan = setting.tokenizer.encode(" stone")
    rows = []
    for episode in range(20):
        for turn in range(2):
            rows.append(
                {
                    "episode": episode,
                    "turn": turn,
                    "step": turn,
                    "observation": "",
                    "plan": " stone" if turn == 0 else "",
                    "style": "plain",
                    "goal": "",
                    "asleep": False,
                    "action": "Noop",
                    "action_id": 0,
                    "learn": turn == 0,
                    "advice": "",
                    "reward": 0.0,
                    "achievements": 0,
                    "observation_tokens": [500 + episode],
                    "plan_tokens": plan if turn == 0 else [],
                    "action_tokens": setting.tokenizer.encode("Noop"),
                }
            )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def load(setting, table, held_out, seed=0, **sft):
    return load_segments(
        table,
        setting.tokenizer,
        setting.language,
        setting.plan,
        RolloutConfig(segment_tokens=64, history=2),
        SftConfig(held_out=held_out, **sft),
        seed,
    )


def test_every_episode_is_trained_on_or_held_out(setting, turns):
    train, held_out = load(setting, turns, 0.25)
    observed = set(range(500, 520))
    ours, theirs = (
        observed & set(data.fields["token"].ravel().tolist())
        for data in (train, held_out)
    )
    assert len(ours) == 15
    assert len(theirs) == 5
    assert ours | theirs == observed


def test_the_choice_is_a_function_of_the_seed(setting, turns):
    one, same, other = (load(setting, turns, 0.25, seed)[1] for seed in (0, 0, 1))
    np.testing.assert_array_equal(one.fields["token"], same.fields["token"])
    assert not np.array_equal(one.fields["token"], other.fields["token"])


@pytest.mark.parametrize(("share", "count"), [(0.0, 1), (1.0, 19)])
def test_at_least_one_episode_is_on_either_side(setting, turns, share, count):
    _, held_out = load(setting, turns, share)
    assert len(set(range(500, 520)) & set(held_out.fields["token"].ravel())) == count


def test_a_turn_is_written_with_its_markers(setting, turns):
    train, _ = load(setting, turns, 0.25)
    encode = setting.tokenizer.encode
    plan = [*encode(setting.plan.open), *encode(" stone"), *encode(setting.plan.close)]
    tokens = train.fields["token"][0].tolist()
    start = len(setting.language.prompt(0))
    word = tokens[start]
    noop = encode("Noop")
    episode = [word, *plan, *noop, word, *noop]
    assert tokens[start : start + len(episode)] == episode


def plans_of(setting, data):
    """The plan of every episode, by the word it saw first."""
    opening, closing = (setting.tokenizer.encode(m)[0] for m in ("{plan}", "<end>"))
    plans = {}
    for row in data.fields["token"].tolist():
        word = 0
        for place, token in enumerate(row):
            word = token if 500 <= token < 520 else word
            if token == opening and row[place + 1] != opening:
                end = row.index(closing, place)
                plans[word] = tuple(row[place + 1 : end])
    return plans


def test_stripped_plans_leave_observations_and_actions(setting, turns):
    kept, stripped = (load(setting, turns, 0.25, plans=p) for p in ("kept", "stripped"))
    for before, after in zip(kept, stripped, strict=True):
        assert not plans_of(setting, after)
        assert not (after.fields["role"] == Role.PLAN).any()
        tokens = [
            set(data.fields["token"].ravel().tolist()) for data in (before, after)
        ]
        assert tokens[1] < tokens[0]
        assert tokens[1] & set(range(500, 520)) == tokens[0] & set(range(500, 520))
        assert before.fields["learn"].sum() > after.fields["learn"].sum()


def test_shuffled_plans_are_the_same_in_other_turns(setting, turns):
    words = setting.tokenizer.encode(" stone light north south west east sleep rest")
    rows = turns.to_pylist()
    for number, row in enumerate(rows[::2]):
        row["plan_tokens"] = [words[number % 8], words[number // 8]]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    kept, _ = load(setting, table, 0.25)
    shuffled, _ = load(setting, table, 0.25, plans="shuffled")
    before, after = plans_of(setting, kept), plans_of(setting, shuffled)
    assert set(before) == set(after)
    assert sorted(before.values()) == sorted(after.values())
    assert sum(before[word] != after[word] for word in before) > len(before) / 2
    again, _ = load(setting, table, 0.25, plans="shuffled")
    assert plans_of(setting, again) == after


def test_observations_are_learnt_if_they_have_a_weight(setting, turns):
    train, _ = load(setting, turns, 0.25, observation_weight=0.5)
    seen = train.fields["role"] == Role.OBSERVATION
    assert (train.fields["learn"][seen] == 1).all()
    carried = train.fields["role"] == Role.CARRIED
    assert not train.fields["learn"][carried].any()
    without, _ = load(setting, turns, 0.25)
    assert not without.fields["learn"][seen].any()
    assert train.fields["learn"].sum() > without.fields["learn"].sum()


def test_the_share_of_padding_is_what_no_episode_owns(setting, turns):
    train, _ = load(setting, turns, 0.25)
    assert train.padding_share == (train.fields["episode"] == 0).mean()
    assert 0 < train.padding_share < 1


def test_the_most_targets_of_a_segment_are_counted(setting, turns):
    for data in load(setting, turns, 0.25):
        most = max(int(learn.sum()) for learn in data.fields["learn"])
        assert most <= data.max_targets < most + 32


def test_a_batch_holds_the_segments_of_its_indices(setting, turns):
    train, _ = load(setting, turns, 0.25)
    batch = train.batch(np.array([1, 0, 1]))
    np.testing.assert_array_equal(batch.token, train.fields["token"][[1, 0, 1]])
    np.testing.assert_array_equal(batch.plan, train.fields["plan"][[1, 0, 1]])


def test_one_episode_is_too_few(setting, turns):
    with pytest.raises(ValueError, match="collect at least 2"):
        load(setting, turns.slice(0, 2), 0.25)
