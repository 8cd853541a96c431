"""Turns as Parquet: one row a turn, text and token ids side by side.

A dataset is a folder of shards, a ``card.json`` and a README that says the same to
people. A shard is written whole and then renamed, so what is there is complete; the
card is written last, so a dataset with a card is complete too. Neither writing nor
counting holds more than one shard in memory.

The text is the truth. Token ids save time while the tokenizer stays the same, whose
hash every shard carries; for another tokenizer they are made anew from the text.
"""

import collections
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from jaxplan.io.dataset_card import write_card
from jaxplan.text.tokenizer import Tokenizer

FORMAT = 3
NO_TOKENS = "none"  # stands for the tokenizer of a dataset of text alone

SCHEMA = pa.schema(
    [
        pa.field("episode", pa.int32(), nullable=False),
        pa.field("turn", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),  # env step the turn acts in
        pa.field("observation", pa.string(), nullable=False),
        pa.field("plan", pa.string(), nullable=False),  # empty: no plan this turn
        pa.field("style", pa.string(), nullable=False),  # how the episode words plans
        pa.field("goal", pa.string(), nullable=False),  # what for; empty: not known
        pa.field("action", pa.string(), nullable=False),
        pa.field("action_id", pa.int16(), nullable=False),
        pa.field("advice", pa.string(), nullable=False),  # a better action, or empty
        pa.field("learn", pa.bool_(), nullable=False),  # False: no action to imitate
        pa.field("asleep", pa.bool_(), nullable=False),  # True: the action is ignored
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("achievements", pa.int32(), nullable=False),  # unlocked so far
        pa.field("observation_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("plan_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("action_tokens", pa.list_(pa.int32()), nullable=False),
    ]
)
# Its functions are made at import; a type checker sees none.
_compute: Any = pyarrow.compute

_TEXTS = ("observation", "plan", "action")  # each with a column of token ids


class DatasetWriter:
    """Writes episodes in shards; a collection that was cut short goes on where it was.

    Args:
        directory: the dataset's folder, made if missing.
        about: what every shard says of itself: ``tokenizer`` (sha256 of its file),
            ``env``, ``text`` (level), ``teacher`` and ``config`` (JSON of the run).
        shard_episodes: episodes in one shard.
        levels: text levels written down besides, as ``observation_<level>``.

    Attributes:
        episodes: how many episodes are safe on disk. After a restart the caller
            collects from this number on.
    """

    def __init__(
        self,
        directory: Path | str,
        about: Mapping[str, str],
        shard_episodes: int = 64,
        levels: Sequence[str] = (),
    ):
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob("*.tmp"):
            leftover.unlink()
        self._about = {"format": str(FORMAT), **about}
        self._shard_episodes = shard_episodes
        self._schema = SCHEMA
        for level in levels:
            field = pa.field(f"observation_{level}", pa.string(), nullable=False)
            self._schema = self._schema.append(field)
        self._pending: list[pa.Table] = []
        self._shards = 0
        self.episodes = 0
        for path in _shards(self._directory):
            _check_about(path, self._about)
            episodes = pq.read_table(path, columns=["episode"])["episode"]
            self.episodes += len(episodes.unique())
            self._shards += 1

    def add_episode(self, turns: Mapping[str, Any]) -> None:
        """Add the turns of the next episode.

        Args:
            turns: the columns of the schema but ``episode`` and ``turn``, which are
                counted here; sequences or Arrow arrays, all of one length, in the order
                they were played.

        Raises:
            ValueError: a column is missing, unknown or of another length.
        """
        wanted = set(self._schema.names) - {"episode", "turn"}
        if set(turns) != wanted:
            raise ValueError(
                f"dataset: columns missing {sorted(wanted - set(turns))}, "
                f"unknown {sorted(set(turns) - wanted)}"
            )
        lengths = {name: len(column) for name, column in turns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"dataset: columns of different lengths: {lengths}")
        count = lengths["step"]
        number = self.episodes + len(self._pending)
        columns = {
            "episode": np.full(count, number, np.int32),
            "turn": np.arange(count, dtype=np.int32),
            **turns,
        }
        self._pending.append(
            pa.Table.from_pydict(
                {name: _column(columns[name]) for name in self._schema.names},
                schema=self._schema,
            )
        )
        if len(self._pending) == self._shard_episodes:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Write what is left, and the card.

        Returns:
            The card.
        """
        if self._pending:
            self._flush()
        card = {**self._about, **_statistics(_shards(self._directory))}
        write_card(self._directory, card, self._schema)
        return card

    def _flush(self) -> None:
        table = pa.concat_tables(self._pending).replace_schema_metadata(self._about)
        path = self._directory / f"turns-{self._shards:05d}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
        self.episodes += len(self._pending)
        self._shards += 1
        self._pending = []


def read_dataset(directory: Path | str, tokenizer: Tokenizer) -> pa.Table:
    """Read all turns, in the order they were collected, with the ids of a tokenizer.

    Args:
        directory: the dataset's folder.
        tokenizer: the one in use; if the dataset has the ids of another one, or none,
            they are made from the text.

    Raises:
        FileNotFoundError: no dataset there, or an unfinished one.
        ValueError: the dataset has another format.
    """
    directory = Path(directory)
    if not (directory / "card.json").exists():
        state = "an unfinished" if _shards(directory) else "no"
        raise FileNotFoundError(
            f"{directory}: {state} dataset (no card.json); run the collect stage"
        )
    tables = [SCHEMA.empty_table()]
    for path in _shards(directory):
        _check_about(path, {"format": str(FORMAT)})
        table = pq.read_table(path, columns=SCHEMA.names).cast(SCHEMA)
        if _said(path, "tokenizer") != tokenizer.sha256:
            table = _encode_anew(table, tokenizer)
        tables.append(table)
    return pa.concat_tables(tables).combine_chunks()


def read_card(directory: Path | str) -> dict[str, Any]:
    """Read the card of a finished dataset: what it is, and its statistics."""
    return json.loads((Path(directory) / "card.json").read_text(encoding="utf-8"))


def ragged(table: pa.Table, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Split a token column into all its tokens and the offsets of its rows.

    Returns:
        ``tokens`` and ``offsets`` (one more than rows): row i is
        ``tokens[offsets[i]:offsets[i + 1]]``.
    """
    column: Any = table[name].combine_chunks()
    tokens = column.flatten().to_numpy(zero_copy_only=False)
    offsets = column.offsets.to_numpy(zero_copy_only=False)
    return tokens, offsets - offsets[0]


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("turns-*.parquet"))


def _said(path: Path, key: str) -> str:
    metadata = pq.read_schema(path).metadata or {}
    return metadata.get(key.encode(), b"nothing").decode()


def _check_about(path: Path, expected: Mapping[str, str]) -> None:
    """Compare what a shard says of itself; which configs agree, the run decides."""
    for key in expected.keys() - {"config"}:
        found = _said(path, key)
        if found != expected[key]:
            raise ValueError(
                f"{path}: made with {key} {found}, wanted {key} {expected[key]}; "
                "use what it was made with, or collect into an empty directory"
            )


def _column(values: Any) -> Any:
    """Arrow takes one-axis arrays and lists; a [rows, n] array becomes lists."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return list(values)
    return values


def _encode_anew(table: pa.Table, tokenizer: Tokenizer) -> pa.Table:
    """Replace the token ids by those of a tokenizer; a text is encoded only once."""
    for name in _TEXTS:
        texts = table[name].combine_chunks().dictionary_encode()
        ids = tokenizer.encode_batch(texts.dictionary.to_pylist())
        rows = [ids[index] for index in texts.indices.to_pylist()]
        place = table.schema.get_field_index(f"{name}_tokens")
        table = table.set_column(
            place, SCHEMA.field(f"{name}_tokens"), pa.array(rows, SCHEMA.types[place])
        )
    return table


def _statistics(shards: Sequence[Path]) -> dict[str, Any]:
    """Counts over all shards, one shard in memory at a time."""
    totals: collections.Counter[str] = collections.Counter()
    styles: dict[str, collections.Counter[str]] = {}
    goals: collections.Counter[str] = collections.Counter()
    for path in shards:
        table = pq.read_table(path, columns=_COUNTED)
        totals.update(_totals(table))
        goals.update(dict(_count_values(table["goal"])))
        for style, _ in _count_values(table["style"]):
            of_style = table.filter(_compute.equal(table["style"], style))
            styles.setdefault(style, collections.Counter()).update(_totals(of_style))
    turns = totals["turns"]
    return {
        "episodes": totals["episodes"],
        "turns": turns,
        "plan_share": _ratio(totals["plans"], turns),
        "learn_share": _ratio(totals["learnt"], turns),
        "asleep_share": _ratio(totals["asleep"], turns),
        "turns_per_episode": _ratio(turns, totals["episodes"]),
        "tokens_per_observation": _ratio(totals["observation_tokens"], turns),
        "tokens_per_plan": _ratio(totals["plan_tokens"], totals["plans"]),
        "words_per_plan": _ratio(totals["plan_words"], totals["plans"]),
        "achievements_mean": _ratio(totals["achievements"], totals["episodes"]),
        "return_mean": _ratio(totals["reward"], totals["episodes"]),
        "goal_shares": {goal: count / turns for goal, count in goals.most_common()},
        "styles": {
            style: {
                "episodes": count["episodes"],
                "plans": count["plans"],
                "words_per_plan": _ratio(count["plan_words"], count["plans"]),
                "tokens_per_plan": _ratio(count["plan_tokens"], count["plans"]),
            }
            for style, count in sorted(styles.items())
        },
    }


_COUNTED = [
    *("episode", "plan", "style", "goal", "learn", "asleep", "reward", "achievements"),
    *("observation_tokens", "plan_tokens"),
]


def _totals(table: pa.Table) -> dict[str, int | float]:
    """What can be added up over shards."""
    plan: Any = table["plan"]
    words = _compute.count_substring_regex(plan, r"\S+")
    reached = table.group_by("episode").aggregate([("achievements", "max")])
    return {
        "episodes": reached.num_rows,
        "turns": table.num_rows,
        "plans": _compute.sum(_compute.not_equal(plan, "")).as_py() or 0,
        "plan_words": _compute.sum(words).as_py() or 0,
        "learnt": _compute.sum(table["learn"]).as_py() or 0,
        "asleep": _compute.sum(table["asleep"]).as_py() or 0,
        "reward": _compute.sum(table["reward"]).as_py() or 0.0,
        "achievements": _compute.sum(reached["achievements_max"]).as_py() or 0,
        "observation_tokens": _flat_length(table["observation_tokens"]),
        "plan_tokens": _flat_length(table["plan_tokens"]),
    }


def _flat_length(column: Any) -> int:
    return _compute.sum(_compute.list_value_length(column)).as_py() or 0


def _count_values(column: Any) -> Iterator[tuple[str, int]]:
    for entry in _compute.value_counts(column):
        yield entry["values"].as_py(), entry["counts"].as_py()


def _ratio(total: int | float, count: int) -> float | None:
    return total / count if count else None
