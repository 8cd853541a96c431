"""The card of a dataset: ``card.json`` for programs, ``README.md`` for people.

The README begins with what the ``datasets`` library reads, so that a folder loads by
its name alone.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

_COLUMNS = {
    "episode": "which trajectory",
    "turn": "which turn in it",
    "step": "the env step in which the turn acts; sleeping steps have no turn",
    "observation": "what the player sees, in the text level of the dataset",
    "plan": "the plan said in this turn; empty where none was",
    "style": "how plans are worded in this trajectory",
    "goal": "what the teacher is after; empty where it is not known",
    "action": "what is done",
    "action_id": "the same as a number",
    "advice": "the action to imitate, where it is another than the one done",
    "learn": "False where there is no action to imitate",
    "asleep": "True where the player sleeps: the action is ignored",
    "reward": "task reward until the next turn",
    "achievements": "unlocked in this trajectory, this turn included",
    "observation_tokens": "token ids of the observation",
    "plan_tokens": "token ids of the plan, cut where it was too long",
    "action_tokens": "token ids of the action",
}
_HEAD = """\
---
configs:
- config_name: default
  data_files: turns-*.parquet
---
# Turns of {teacher} in {env}

{episodes:,} trajectories, {turns:,} turns, text level `{text}`. One row is one turn.

```python
import glob, pandas

turns = pandas.read_parquet(sorted(glob.glob("path/of/this/folder/turns-*.parquet")))

import datasets

turns = datasets.load_dataset("path/of/this/folder", split="train")
```
"""
_NUMBERS = {
    "achievements_mean": "achievements of a trajectory, mean",
    "return_mean": "return of a trajectory, mean",
    "turns_per_episode": "turns of a trajectory, mean",
    "plan_share": "share of turns with a plan",
    "learn_share": "share of actions to imitate",
    "asleep_share": "share of turns asleep",
    "words_per_plan": "words of a plan, mean",
    "tokens_per_plan": "tokens of a plan, mean",
    "tokens_per_observation": "tokens of an observation, mean",
}


def write_card(directory: Path, card: Mapping[str, Any], schema: pa.Schema) -> None:
    """Write the card; ``card.json`` last, as it says that all is there.

    Args:
        directory: of the dataset.
        card: what the shards say of themselves, and the statistics.
        schema: of the shards.
    """
    _replace(directory / "README.md", _readme(card, schema))
    _replace(directory / "card.json", json.dumps(card, indent=2) + "\n")


def _readme(card: Mapping[str, Any], schema: pa.Schema) -> str:
    numbers = [
        f"| {meaning} | {card[name]:.4g} |"
        for name, meaning in _NUMBERS.items()
        if card[name] is not None
    ]
    styles = [
        f"| {style} | {row['episodes']:,} | {row['plans']:,} | "
        f"{row['words_per_plan'] or 0:.1f} | {row['tokens_per_plan'] or 0:.1f} |"
        for style, row in card["styles"].items()
    ]
    goals = [f"| {goal} | {share:.1%} |" for goal, share in card["goal_shares"].items()]
    columns = [
        f"| `{field.name}` | {_COLUMNS.get(field.name, 'the same in another text')} |"
        for field in schema
    ]
    about = [
        f"| {name} | `{card[name]}` |" for name in ("tokenizer", "format") if card[name]
    ]
    tables = (
        ("| | |\n|---|---|", [*numbers, *about]),
        ("| column | meaning |\n|---|---|", columns),
        ("| style | trajectories | plans | words | tokens |\n|---|---|---|---|---|",
         styles),
        ("| goal | share of turns |\n|---|---|", goals),
    )  # fmt: skip
    parts = [_HEAD.format(**card)]
    parts += ["\n".join((head, *rows)) + "\n" for head, rows in tables if rows]
    return "\n".join(parts)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
