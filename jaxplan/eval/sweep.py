"""The table and the figure of a sweep: what planning earns at each price.

All points play the same worlds, so a world's number is averaged over the seeds of
training first, and intervals are over worlds; how much the seeds differ stands beside.
Differences to the first point are over both.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxplan.config.schema import SweepConfig
from jaxplan.eval.stats import bootstrap, bootstrap_crossed, show_interval
from jaxplan.io.metrics import read_metrics

PRICES = "plan.prices"  # the key of a price that an agent is told
_WORLD_BY_WORLD = ("world_seeds", "returns")  # of a row, too long to be kept
_OVER_WORLDS = "[over worlds]"  # what an interval covers; not the chance of training
_NEVER, _ALWAYS = 0.01, 0.99  # plan rates beyond which an agent has stopped choosing


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
        values: by key.
    """

    values: Mapping[str, float | str]

    @property
    def name(self) -> str:
        """What tells it from the other points, fit for a folder's name."""
        parts = (
            f"{_shortest(key, self.values)}={show_value(value)}"
            for key, value in self.values.items()
        )
        return re.sub(r"[^A-Za-z0-9._=+@-]+", "_", "-".join(parts))

    @property
    def overrides(self) -> list[str]:
        """As on the command line."""
        return [f"{key}={show_value(value)}" for key, value in self.values.items()]


def show_value(value: float | str) -> str:
    """A value as people write it, with all of its digits."""
    return value if isinstance(value, str) else repr(float(value)).removesuffix(".0")


def _shortest(key: str, keys: Iterable[str]) -> str:
    """The last words of a key, as few as tell it from the other keys."""
    others = [f".{other}" for other in keys if other != key]
    words = key.split(".")
    ends = (".".join(words[first:]) for first in range(len(words) - 1, -1, -1))
    clear = (end for end in ends if not any(o.endswith(f".{end}") for o in others))
    return next(clear, key)


def points(sweep: SweepConfig) -> Iterator[Point]:
    """Every value of every axis with every other."""
    keys = [key for key, _ in sweep.axes]
    for values in itertools.product(*(values for _, values in sweep.axes)):
        yield Point(dict(zip(keys, values, strict=True)))


def summarise_point(
    point: Point,
    runs: Sequence[Path],
    arm: str,
    mode: str,
    confidence: float,
    price: float | None = None,
    first: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One row of the table.

    Args:
        point: what was set.
        runs: directories of its finished runs, one a seed.
        arm: who played.
        mode: in which plan mode.
        confidence: of the intervals.
        price: of a plan token, for agents that are told one: a row is of one price.
        first: the row that others are compared with; None for itself.

    Returns:
        The values; intervals of ``return``, ``events`` and ``plan_tokens_per_step``;
        the mean return and plan rate of each seed; ``collapse``, by seed: None, or
        at which end the plan rate was in training and from which iteration on;
        ``first_minus_it``, of returns; and the ``commits`` that made the runs, ""
        for one that nobody knows.

    Raises:
        ValueError: the runs did not play the same worlds.
    """
    told = "" if price is None else f"{price:.12g}"
    markers = [_evaluation(run, f"{arm}@{told}" if told else arm) for run in runs]
    rates = f"rollout/plan_rate_at_{told}" if told else "rollout/plan_rate"
    played = [marker["episodes"][mode] for marker in markers]
    worlds = (first or {"world_seeds": played[0]["seed"]})["world_seeds"]
    if any(own["seed"] != worlds for own in played):
        raise ValueError(f"sweep: the runs of {point.name} played different worlds")
    returns = np.array([own["return"] for own in played], float)
    behind = np.array((first or {"returns": returns})["returns"]) - returns
    events = np.array([[len(row) for row in own["unlocked"]] for own in played], float)
    steps = np.array([own["steps"] for own in played], float)
    tokens = np.array([own["plan_tokens"] for own in played], float)
    columns = {
        "return": returns,
        "events": events,
        "plan_tokens_per_step": tokens / np.maximum(steps, 1),
    }
    return {
        "values": dict(point.values) | ({} if price is None else {PRICES: price}),
        "seeds": len(runs),
        "worlds": returns.shape[1],
        "commits": sorted({marker.get("commit") or "" for marker in markers}),
        "first_minus_it": bootstrap_crossed(behind, confidence).to_json(),
        **{
            name: bootstrap(column.mean(axis=0), confidence).to_json()
            for name, column in columns.items()
        },
        "world_seeds": worlds,
        "returns": returns.tolist(),
        "return_by_seed": returns.mean(axis=1).tolist(),
        "plan_rate_by_seed": [_plan_rate(marker, mode) for marker in markers],
        "collapse": [collapse(_column(run, rates)) for run in runs],
    }


def collapse(plan_rates: Sequence[float]) -> dict[str, Any] | None:
    """When an agent stopped choosing, and stayed so until the end of training.

    Args:
        plan_rates: share of turns with a plan, by iteration.
    """
    rates = np.asarray(plan_rates, float)
    for end, beyond in (("never", rates < _NEVER), ("always", rates > _ALWAYS)):
        if beyond.size and beyond[-1]:
            others = np.flatnonzero(~beyond)
            return {"to": end, "iteration": int(others[-1]) + 1 if others.size else 0}
    return None


def _evaluation(run: Path, arm: str) -> dict[str, Any]:
    file = run / "stages" / f"evaluate-{arm}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _plan_rate(evaluation: Mapping[str, Any], mode: str) -> float:
    (row,) = (row for row in evaluation["results"] if row["mode"] == mode)
    return row["plan_rate"]["mean"]


def _column(run: Path, name: str) -> list[float]:
    return [r[name] for r in read_metrics(run) if r["stage"] == "ppo" and name in r]


def write_sweep(
    rows: Sequence[dict[str, Any]],
    about: Mapping[str, Any],
    folder: Path,
    beside: Path | None = None,
) -> str:
    """Write ``result.json``, ``table.md`` and ``pareto.png``.

    Args:
        rows: of ``summarise_point``.
        about: what the sweep was and what made it; kept in ``result.json``.
        folder: made if missing.
        beside: another sweep's ``result.json``, to be drawn in the same figure.

    Returns:
        The table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = [{k: v for k, v in row.items() if k not in _WORLD_BY_WORLD} for row in rows]
    table, result = format_sweep(kept), {**about, "rows": kept}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "table.md").write_text(table)
    others = [] if beside is None else [read_rows(beside)]
    _draw([rows, *others], folder / "pareto.png")
    return table


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a sweep's ``result.json``.

    Raises:
        ValueError: it is missing, or is no such file.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        if all(
            {"values", "return", "plan_tokens_per_step"} <= row.keys() for row in rows
        ):
            return rows
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f"{file}: wanted is the result.json that a sweep has written")


def format_sweep(rows: Sequence[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    keys = list(rows[0]["values"])
    head = [
        *keys,
        f"return {_OVER_WORLDS}",
        "first minus it [over seeds and worlds]",
        "by seed",
        f"events {_OVER_WORLDS}",
        f"plan tokens a step {_OVER_WORLDS}",
        "plan rate by seed",
        "collapse",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append(
            [
                *(show_value(row["values"][key]) for key in keys),
                show_interval(row["return"]),
                show_interval(row["first_minus_it"]),
                _each(row["return_by_seed"]),
                show_interval(row["events"]),
                show_interval(row["plan_tokens_per_step"]),
                _each(row["plan_rate_by_seed"]),
                ", ".join(map(_show_collapse, row["collapse"])),
            ]
        )  # fmt: skip
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _each(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:.2f}" for number in numbers)


def _show_collapse(found: Mapping[str, Any] | None) -> str:
    return "no" if found is None else f"{found['to']} from {found['iteration']}"


def _reach(interval: Mapping[str, float | None]) -> list[list[float]]:
    """How far an interval reaches down and up from its mean, as matplotlib wants it."""
    mean, low, high = (interval[name] for name in ("mean", "low", "high"))
    if mean is None or low is None or high is None:
        return [[0.0], [0.0]]
    return [[mean - low], [high - mean]]


def _draw(sweeps: Sequence[Sequence[dict[str, Any]]], file: Path) -> None:
    """Return against plan tokens, one mark a point, with both intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for rows, mark in zip(sweeps, "os", strict=False):
        x, y = (
            [row[column] for row in rows]
            for column in ("plan_tokens_per_step", "return")
        )
        axes.errorbar(
            [at["mean"] for at in x],
            [at["mean"] for at in y],
            xerr=np.hstack([_reach(at) for at in x]),
            yerr=np.hstack([_reach(at) for at in y]),
            fmt=mark,
            capsize=3,
            label=", ".join(rows[0]["values"]),
        )
        for row, tokens, earned in zip(rows, x, y, strict=True):
            axes.annotate(
                ", ".join(map(show_value, row["values"].values())),
                (tokens["mean"], earned["mean"]),
                textcoords="offset points",
                xytext=(6, 6),
            )
    axes.set_xlabel(f"plan tokens a step {_OVER_WORLDS}")
    axes.set_ylabel(f"return, without plan cost {_OVER_WORLDS}")
    axes.legend()
    figure.savefig(file, dpi=150)
