"""The table of the priming experiment: do plans help imitation?

All students play the same worlds, so what is compared is compared world by world: a
world's number is averaged over the seeds of training first, and the intervals are over
worlds. How much the seeds differ stands beside them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from jaxplan.eval.report import crafter_score
from jaxplan.eval.stats import bootstrap, paired_difference, show_interval
from jaxplan.io.metrics import read_metrics
from jaxplan.io.rundir import marker

_RESAMPLES = 2_000  # of the worlds, for the score


@dataclasses.dataclass(frozen=True)
class Student:
    """What one student did, over the seeds of training (host).

    Attributes:
        name: of the arm.
        unlocked: which events happened, by seed, world and event.
        alive: whether the episode ended by the time limit, by seed and world.
        plan_tokens_per_step: by seed and world.
        sft: results of the SFT stage, by seed; none where other runs have learnt.
    """

    name: str
    unlocked: Bool[np.ndarray, "seeds worlds E"]
    alive: Bool[np.ndarray, "seeds worlds"]
    plan_tokens_per_step: Float[np.ndarray, "seeds worlds"]
    sft: Sequence[Mapping[str, Any]]


def read_student(
    name: str, runs: Sequence[Path], mode: str, num_events: int
) -> Student:
    """Read a student from the finished runs of its seeds.

    Args:
        name: of the arm.
        runs: run directories.
        mode: the plan mode that counts.
        num_events: of the world.

    Raises:
        ValueError: the runs did not play the same worlds.
    """
    played = [_read(run, "evaluate-sft")["episodes"][mode] for run in runs]
    if any(own["seed"] != played[0]["seed"] for own in played):
        raise ValueError(f"priming: the seeds of {name} played different worlds")
    unlocked = np.zeros((len(runs), len(played[0]["seed"]), num_events), bool)
    for rows, own in zip(unlocked, played, strict=True):
        for row, events in zip(rows, own["unlocked"], strict=True):
            row[events] = True
    tokens = np.array([own["plan_tokens"] for own in played], float)
    steps = np.array([own["steps"] for own in played], float)
    return Student(
        name=name,
        unlocked=unlocked,
        alive=np.array([own["alive"] for own in played], bool),
        plan_tokens_per_step=tokens / np.maximum(steps, 1),
        sft=[_read(run, "sft") for run in runs if marker(run, "sft").exists()],
    )


def _read(run: Path, stage: str) -> dict[str, Any]:
    return json.loads(marker(run, stage).read_text(encoding="utf-8"))


def summarise(
    students: Sequence[Student], event_names: Sequence[str], confidence: float
) -> list[dict[str, Any]]:
    """One row for each student; the first is what the others are compared with.

    Args:
        students: of the experiment.
        event_names: of the world.
        confidence: of the intervals.
    """
    first = students[0].unlocked.sum(axis=2).mean(axis=0)
    rows = []
    for student in students:
        counts = student.unlocked.sum(axis=2)
        by_world = counts.mean(axis=0)
        rates = student.unlocked.mean(axis=(0, 1))
        rows.append(
            {
                "student": student.name,
                "seeds": len(counts),
                "worlds": len(by_world),
                "achievements": bootstrap(by_world, confidence).to_json(),
                "achievements_by_seed": counts.mean(axis=1).tolist(),
                "behind_first": paired_difference(
                    first, by_world, confidence
                ).to_json(),
                "score": _score(student.unlocked, confidence),
                "alive": bootstrap(student.alive.mean(axis=0), confidence).to_json(),
                "plan_tokens_per_step": bootstrap(
                    student.plan_tokens_per_step.mean(axis=0), confidence
                ).to_json(),
                "per_event": dict(zip(event_names, rates.tolist(), strict=True)),
                **_held_out(student.sft),
            }
        )
    return rows


def summarise_guided(
    own: Sequence[Student], guided: Sequence[tuple[str, Student]], confidence: float
) -> list[dict[str, Any]]:
    """One row for each student that played with the help of its teacher.

    Args:
        own: the students without help.
        guided: some of them with it, in the same worlds, and the plan mode.
        confidence: of the intervals.
    """
    alone = {each.name: each.unlocked.sum(axis=2).mean(axis=0) for each in own}
    rows = []
    for mode, student in guided:
        counts = student.unlocked.sum(axis=2)
        by_world = counts.mean(axis=0)
        gain = paired_difference(by_world, alone[student.name], confidence)
        tokens = student.plan_tokens_per_step.mean(axis=0)
        rows.append(
            {
                "student": student.name,
                "mode": mode,
                "achievements": bootstrap(by_world, confidence).to_json(),
                "achievements_by_seed": counts.mean(axis=1).tolist(),
                "gain": gain.to_json(),
                "score": _score(student.unlocked, confidence),
                "alive": bootstrap(student.alive.mean(axis=0), confidence).to_json(),
                "plan_tokens_per_step": bootstrap(tokens, confidence).to_json(),
            }
        )
    return rows


def _score(
    unlocked: Bool[np.ndarray, "seeds worlds E"], confidence: float
) -> dict[str, float]:
    """Crafter's score of the pooled episodes, with a bootstrap interval over worlds."""
    by_world = unlocked.mean(axis=0)
    chance = np.random.default_rng(0)
    worlds = len(by_world)
    drawn = [
        crafter_score(by_world[chance.integers(worlds, size=worlds)].mean(axis=0))
        for _ in range(_RESAMPLES)
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    mean = crafter_score(by_world.mean(axis=0))
    return {"mean": mean, "low": float(low), "high": float(high)}


def _held_out(sft: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Held-out numbers, mean over seeds; null where a student has no such tokens."""
    names = {
        "perplexity_decide": "sft/held_out_perplexity_decide",
        "perplexity_plan": "sft/held_out_perplexity_plan",
        "perplexity_action": "sft/held_out_perplexity_action",
        "start_kl": "sft/held_out_start_kl",
        "updates": "updates",
    }
    return {
        short: float(np.mean([own[name] for own in sft])) if name in sft[0] else None
        for short, name in names.items()
    }


def measure(data: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """How the experiment went: what was collected, seconds by stage, speed of SFT.

    Args:
        data: directory of the run that collected.
        runs: of all others.

    Returns:
        ``wall_seconds`` by stage, summed over runs; statistics of the ``dataset``;
        median ``sft_tokens_per_second`` of a run; mean ``padding_share``.
    """
    card = json.loads((data / "dataset" / "card.json").read_text(encoding="utf-8"))
    told = {
        name: value for name, value in card.items() if isinstance(value, float | int)
    }
    sft = [_read(run, "sft") for run in runs if marker(run, "sft").exists()]
    seconds = {"collect": _read(data, "collect")["wall_seconds"]}
    seconds["sft"] = sum(own["wall_seconds"] for own in sft)
    seconds["evaluate"] = playing_seconds(runs)
    speeds = [
        row["sft/tokens_per_second"]
        for run in runs
        for row in read_metrics(run)
        if "sft/tokens_per_second" in row
    ]
    return {
        "wall_seconds": seconds,
        "dataset": told,
        "sft_tokens_per_second": median(speeds),
        "padding_share": float(np.mean([own["padding_share"] for own in sft])),
    }


def playing_seconds(runs: Sequence[Path]) -> float:
    """How long some runs have played, one after the other."""
    return float(sum(_read(run, "evaluate")["wall_seconds"] for run in runs))


def format_priming(result: Mapping[str, Any]) -> str:
    """Write the tables of the experiment as Markdown.

    Args:
        result: ``students``, the rows of ``summarise``; and ``curves``, by student the
            results of the panel over forced plan frequencies.
    """
    rows = result["students"]
    head = (
        *("student", "achievements", "by seed", "first minus it", "score", "alive"),
        *("perplexity decide", "plan", "action", "KL to start", "plan tokens a step"),
    )
    body = [
        (
            row["student"],
            show_interval(row["achievements"]),
            " ".join(f"{mean:.2f}" for mean in row["achievements_by_seed"]),
            show_interval(row["behind_first"]),
            show_interval(row["score"]),
            show_interval(row["alive"]),
            *(_number(row[f"perplexity_{r}"]) for r in ("decide", "plan", "action")),
            _number(row["start_kl"]),
            show_interval(row["plan_tokens_per_step"]),
        )
        for row in rows
    ]
    events = [
        (name, *(f"{row['per_event'][name]:.0%}" for row in rows))
        for name in rows[0]["per_event"]
    ]
    parts = [
        _markdown(head, body),
        _markdown(("achievement", *(row["student"] for row in rows)), events),
    ]
    for student, results in result["curves"].items():
        parts.append(_curve(f"{student}, forced", results))
    return "\n".join(parts)


def format_guided(result: Mapping[str, Any]) -> str:
    """Write the tables of the students with their teacher's help, as Markdown.

    Args:
        result: ``students``, the rows of ``summarise_guided``; and the ``curve`` of one
            ``student`` over how often, the ``results`` of the panel.
    """
    head = (
        *("student", "with the expert's help", "achievements", "by seed"),
        *("more than without", "score", "alive", "plan tokens a step"),
    )
    body = [
        (
            row["student"],
            row["mode"],
            show_interval(row["achievements"]),
            " ".join(f"{mean:.2f}" for mean in row["achievements_by_seed"]),
            *(show_interval(row[name]) for name in ("gain", "score", "alive")),
            show_interval(row["plan_tokens_per_step"]),
        )
        for row in result["students"]
    ]
    curve = result["curve"]
    title = f"{curve['student']}, guided"
    return "\n".join([_markdown(head, body), _curve(title, curve["results"])])


def _curve(title: str, results: Sequence[Mapping[str, Any]]) -> str:
    body = [
        (
            own["mode"],
            show_interval(own["achievements"]),
            show_interval(own["plan_rate"]),
            show_interval(own["steps"]),
        )
        for own in results
    ]
    return _markdown((title, "achievements", "plan rate", "steps"), body)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
