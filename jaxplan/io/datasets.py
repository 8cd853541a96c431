"""Collected turns as Parquet: one row a turn, text and token ids side by side.

A dataset is a folder of shards and a ``card.json``. A shard is written whole and then
renamed, so what is there is complete; the card is written last, so a dataset with a
card is complete too. Token ids mean nothing without their tokenizer: every shard
carries its hash, and reading checks it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1

SCHEMA = pa.schema(
    [
        pa.field("episode", pa.int32(), nullable=False),
        pa.field("turn", pa.int32(), nullable=False),
        pa.field("step", pa.int32(), nullable=False),  # env step the turn acts in
        pa.field("observation", pa.string(), nullable=False),
        pa.field("plan", pa.string(), nullable=False),  # empty: no plan this turn
        pa.field("action", pa.string(), nullable=False),
        pa.field("action_id", pa.int16(), nullable=False),
        pa.field("learn", pa.bool_(), nullable=False),  # False: noise, not imitated
        pa.field("reward", pa.float32(), nullable=False),
        pa.field("achievements", pa.int32(), nullable=False),  # unlocked so far
        pa.field("observation_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("plan_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("action_tokens", pa.list_(pa.int32()), nullable=False),
    ]
)


class DatasetWriter:
    """Writes episodes in shards; a collection that was cut short goes on where it was.

    Args:
        directory: the dataset's folder, made if missing.
        about: what every shard says of itself: ``tokenizer`` (sha256 of its file),
            ``env``, ``text`` (level) and ``config`` (JSON of the whole run).
        shard_episodes: episodes in one shard.

    Attributes:
        episodes: how many episodes are safe on disk. After a restart the caller
            collects from this number on.
    """

    def __init__(
        self,
        directory: Path | str,
        about: Mapping[str, str],
        shard_episodes: int = 64,
    ):
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        for leftover in self._directory.glob("*.tmp"):
            leftover.unlink()
        self._about = {"format": str(FORMAT), **about}
        self._shard_episodes = shard_episodes
        self._pending: list[pa.Table] = []
        self.episodes = 0
        for path in _shards(self._directory):
            _check_about(path, self._about)
            self.episodes += len(
                pq.read_table(path, columns=["episode"])["episode"].unique()
            )

    def add_episode(self, turns: Mapping[str, Sequence[Any] | np.ndarray]) -> None:
        """Add the turns of the next episode.

        Args:
            turns: the columns of ``SCHEMA`` but ``episode`` and ``turn``, which are
                counted here; all of one length, in the order they were played.

        Raises:
            ValueError: a column is missing, unknown or of another length.
        """
        wanted = set(SCHEMA.names) - {"episode", "turn"}
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
                {name: _column(columns[name]) for name in SCHEMA.names}, schema=SCHEMA
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
        card = {**self._about, **_statistics(_read_shards(self._directory))}
        temporary = self._directory / "card.json.tmp"
        temporary.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self._directory / "card.json")
        return card

    def _flush(self) -> None:
        table = pa.concat_tables(self._pending).replace_schema_metadata(self._about)
        path = self._directory / f"turns-{len(_shards(self._directory)):05d}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(table, temporary, compression="zstd")
        os.replace(temporary, path)
        self.episodes += len(self._pending)
        self._pending = []


def read_dataset(directory: Path | str, tokenizer: str) -> pa.Table:
    """Read all turns, in the order they were collected.

    Args:
        directory: the dataset's folder.
        tokenizer: sha256 of the tokenizer in use.

    Raises:
        FileNotFoundError: no dataset there, or an unfinished one.
        ValueError: the dataset has other token ids, or another format.
    """
    directory = Path(directory)
    if not (directory / "card.json").exists():
        state = "an unfinished" if _shards(directory) else "no"
        raise FileNotFoundError(
            f"{directory}: {state} dataset (no card.json); run the collect stage"
        )
    expected = {"format": str(FORMAT), "tokenizer": tokenizer}
    for path in _shards(directory):
        _check_about(path, expected)
    return _read_shards(directory)


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
    return tokens, column.offsets.to_numpy(zero_copy_only=False)


def _shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("turns-*.parquet"))


def _read_shards(directory: Path) -> pa.Table:
    tables = [pq.read_table(path, schema=SCHEMA) for path in _shards(directory)]
    return pa.concat_tables(tables or [SCHEMA.empty_table()]).combine_chunks()


def _check_about(path: Path, expected: Mapping[str, str]) -> None:
    """Compare what a shard says of itself; which configs agree, the run decides."""
    metadata = pq.read_schema(path).metadata or {}
    for key in expected.keys() - {"config"}:
        found = metadata.get(key.encode(), b"nothing").decode()
        if found != expected[key]:
            raise ValueError(
                f"{path}: made with {key} {found}, wanted {key} {expected[key]}; "
                "use what it was made with, or collect into an empty directory"
            )


def _column(values: Sequence[Any] | np.ndarray) -> Any:
    """Arrow takes one-axis arrays and lists; a [rows, n] array becomes lists."""
    if isinstance(values, np.ndarray) and values.ndim > 1:
        return list(values)
    return values


def _statistics(table: pa.Table) -> dict[str, Any]:
    planned = table["plan"].to_numpy() != ""
    reached = table.group_by("episode").aggregate([("achievements", "max")])
    observation_lengths = np.diff(ragged(table, "observation_tokens")[1])
    plan_lengths = np.diff(ragged(table, "plan_tokens")[1])
    return {
        "episodes": reached.num_rows,
        "turns": table.num_rows,
        "plan_share": _mean(planned),
        "learn_share": _mean(table["learn"].to_numpy()),
        "tokens_per_observation": _mean(observation_lengths),
        "tokens_per_plan": _mean(plan_lengths[planned]),
        "achievements_mean": _mean(reached["achievements_max"].to_numpy()),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if values.size else None
