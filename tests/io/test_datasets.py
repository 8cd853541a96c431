import dataclasses
import json
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest

from jaxplan.io.datasets import (
    SCHEMA,
    DatasetWriter,
    ragged,
    read_card,
    read_dataset,
)
from jaxplan.text.tokenizer import load_tokenizer

ABOUT = {
    "tokenizer": "abc1",
    "env": "toy",
    "text": "compact",
    "teacher": "me",
    "config": "{}",
}


@cache
def tokenizer(sha256="abc1"):
    return dataclasses.replace(load_tokenizer("shipped"), sha256=sha256)


def episode(turns, plans=()):
    return {
        "step": np.arange(turns) * 2,
        "observation": [f"you see {i}" for i in range(turns)],
        "plan": [f"plan {i}" if i in plans else "" for i in range(turns)],
        "style": ["plain"] * turns,
        "goal": ["rest"] * turns,
        "action": ["noop"] * turns,
        "action_id": np.full(turns, 3),
        "learn": [i != 1 for i in range(turns)],
        "advice": [""] * turns,
        "asleep": [i == 2 for i in range(turns)],
        "reward": np.linspace(0, 1, turns),
        "achievements": np.arange(turns),
        "observation_tokens": [list(range(i + 1)) for i in range(turns)],
        "plan_tokens": [[7, 8] if i in plans else [] for i in range(turns)],
        "action_tokens": np.full((turns, 2), 9),
    }


def write(directory, lengths, **options):
    writer = DatasetWriter(directory, ABOUT, **options)
    for turns in lengths:
        writer.add_episode(episode(turns, plans=(0,)))
    return writer.close()


def test_turns_come_back_as_they_were_added(tmp_path):
    write(tmp_path, [3, 1, 2], shard_episodes=2)
    assert len(list(tmp_path.glob("turns-*.parquet"))) == 2
    table = read_dataset(tmp_path, tokenizer())
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    assert [(r["episode"], r["turn"]) for r in rows] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (2, 0),
        (2, 1),
    ]
    assert rows[2] == {
        "episode": 0,
        "turn": 2,
        "step": 4,
        "observation": "you see 2",
        "plan": "",
        "style": "plain",
        "goal": "rest",
        "action": "noop",
        "action_id": 3,
        "learn": True,
        "advice": "",
        "asleep": True,
        "reward": 1.0,
        "achievements": 2,
        "observation_tokens": [0, 1, 2],
        "plan_tokens": [],
        "action_tokens": [9, 9],
    }


def test_token_columns_split_into_tokens_and_offsets(tmp_path):
    write(tmp_path, [3, 1])
    tokens, offsets = ragged(read_dataset(tmp_path, tokenizer()), "observation_tokens")
    assert tokens.tolist() == [0, 0, 1, 0, 1, 2, 0]
    assert offsets.tolist() == [0, 1, 3, 6, 7]


def test_the_card_counts_what_is_in_the_dataset(tmp_path):
    card = write(tmp_path, [3, 1])
    assert card == json.loads((tmp_path / "card.json").read_text())
    assert card == read_card(tmp_path)
    assert card["episodes"] == 2
    assert card["turns"] == 4
    assert card["plan_share"] == 0.5
    assert card["learn_share"] == 0.75
    assert card["tokens_per_observation"] == 7 / 4
    assert card["tokens_per_plan"] == 2.0
    assert card["achievements_mean"] == 1.0
    assert card["asleep_share"] == 0.25
    assert card["return_mean"] == pytest.approx((0 + 0.5 + 1 + 0) / 2)
    assert card["goal_shares"] == {"rest": 1.0}
    assert card["styles"]["plain"]["words_per_plan"] == 2.0
    readme = (tmp_path / "README.md").read_text()
    assert "2 trajectories, 4 turns" in readme
    assert "| plain | 2 | 2 | 2.0 | 2.0 |" in readme
    assert card["tokenizer"] == "abc1"


def test_a_dataset_without_episodes_has_a_card_that_says_so(tmp_path):
    card = DatasetWriter(tmp_path, ABOUT).close()
    assert card["episodes"] == 0
    assert card["plan_share"] is None
    assert read_dataset(tmp_path, tokenizer()).num_rows == 0


def test_another_tokenizer_gets_its_ids_from_the_text(tmp_path):
    write(tmp_path, [3, 1], shard_episodes=1)
    table = read_dataset(tmp_path, tokenizer("zzz9"))
    assert table.schema.equals(SCHEMA)
    for row in table.to_pylist():
        for name in ("observation", "plan", "action"):
            assert row[f"{name}_tokens"] == tokenizer().encode(row[name])
    tokens, offsets = ragged(table, "plan_tokens")
    assert len(tokens) == offsets[-1] == 2 * len(tokenizer().encode("plan 0"))


def test_further_texts_have_columns_of_their_own(tmp_path):
    writer = DatasetWriter(tmp_path, ABOUT, levels=("long",))
    with pytest.raises(ValueError, match=r"missing \['observation_long'\]"):
        writer.add_episode(episode(2))
    writer.add_episode({**episode(2), "observation_long": ["a b", "c d"]})
    writer.close()
    shard = pq.read_table(tmp_path / "turns-00000.parquet")
    assert shard["observation_long"].to_pylist() == ["a b", "c d"]
    assert read_dataset(tmp_path, tokenizer()).schema.equals(SCHEMA)


def test_a_collection_that_was_killed_goes_on_after_its_last_whole_shard(tmp_path):
    writer = DatasetWriter(tmp_path, ABOUT, shard_episodes=2)
    for turns in (1, 2, 3):
        writer.add_episode(episode(turns))
    (tmp_path / "turns-00001.tmp").write_bytes(b"torn")
    with pytest.raises(FileNotFoundError, match="an unfinished dataset"):
        read_dataset(tmp_path, tokenizer())
    again = DatasetWriter(tmp_path, ABOUT, shard_episodes=2)
    assert again.episodes == 2
    again.add_episode(episode(4))
    again.close()
    table = read_dataset(tmp_path, tokenizer())
    assert table["episode"].to_pylist() == [0, 1, 1, 2, 2, 2, 2]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        ".json",
        ".md",
        ".parquet",
        ".parquet",
    ]


def test_a_collection_does_not_go_on_in_the_folder_of_another_run(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(ValueError, match="made with env toy, wanted env other"):
        DatasetWriter(tmp_path, ABOUT | {"env": "other"})


def test_no_dataset_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset.*run the collect stage"):
        read_dataset(tmp_path / "nowhere", tokenizer())


def test_columns_are_checked(tmp_path):
    writer = DatasetWriter(tmp_path, ABOUT)
    turns = episode(2)
    del turns["plan"]
    with pytest.raises(ValueError, match=r"missing \['plan'\], unknown \['thought'\]"):
        writer.add_episode({**turns, "thought": ["", ""]})
    with pytest.raises(ValueError, match="different lengths"):
        writer.add_episode({**episode(2), "plan": [""]})


def test_every_shard_says_what_it_is(tmp_path):
    write(tmp_path, [1])
    metadata = pq.read_schema(tmp_path / "turns-00000.parquet").metadata
    assert {k.decode(): v.decode() for k, v in metadata.items()} == {
        "format": "3",
        **ABOUT,
    }
