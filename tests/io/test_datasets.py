import json

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

ABOUT = {"tokenizer": "abc1", "env": "toy", "text": "compact", "config": "{}"}


def episode(turns, plans=()):
    return {
        "step": np.arange(turns) * 2,
        "observation": [f"you see {i}" for i in range(turns)],
        "plan": [f"plan {i}" if i in plans else "" for i in range(turns)],
        "action": ["noop"] * turns,
        "action_id": np.full(turns, 3),
        "learn": [i != 1 for i in range(turns)],
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
    table = read_dataset(tmp_path, "abc1")
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
        "action": "noop",
        "action_id": 3,
        "learn": True,
        "reward": 1.0,
        "achievements": 2,
        "observation_tokens": [0, 1, 2],
        "plan_tokens": [],
        "action_tokens": [9, 9],
    }


def test_token_columns_split_into_tokens_and_offsets(tmp_path):
    write(tmp_path, [3, 1])
    tokens, offsets = ragged(read_dataset(tmp_path, "abc1"), "observation_tokens")
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
    assert card["tokenizer"] == "abc1"


def test_a_dataset_without_episodes_has_a_card_that_says_so(tmp_path):
    card = DatasetWriter(tmp_path, ABOUT).close()
    assert card["episodes"] == 0
    assert card["plan_share"] is None
    assert read_dataset(tmp_path, "abc1").num_rows == 0


def test_another_tokenizer_is_refused_and_both_are_named(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(ValueError, match="tokenizer abc1, wanted tokenizer zzz9"):
        read_dataset(tmp_path, "zzz9")


def test_a_collection_that_was_killed_goes_on_after_its_last_whole_shard(tmp_path):
    writer = DatasetWriter(tmp_path, ABOUT, shard_episodes=2)
    for turns in (1, 2, 3):
        writer.add_episode(episode(turns))
    (tmp_path / "turns-00001.tmp").write_bytes(b"torn")
    with pytest.raises(FileNotFoundError, match="an unfinished dataset"):
        read_dataset(tmp_path, "abc1")
    again = DatasetWriter(tmp_path, ABOUT, shard_episodes=2)
    assert again.episodes == 2
    again.add_episode(episode(4))
    again.close()
    table = read_dataset(tmp_path, "abc1")
    assert table["episode"].to_pylist() == [0, 1, 1, 2, 2, 2, 2]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [
        ".json",
        ".parquet",
        ".parquet",
    ]


def test_a_collection_does_not_go_on_in_the_folder_of_another_run(tmp_path):
    write(tmp_path, [1])
    with pytest.raises(ValueError, match="made with env toy, wanted env other"):
        DatasetWriter(tmp_path, ABOUT | {"env": "other"})


def test_no_dataset_is_an_error_that_says_what_to_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no dataset.*run the collect stage"):
        read_dataset(tmp_path / "nowhere", "abc1")


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
        "format": "1",
        **ABOUT,
    }
