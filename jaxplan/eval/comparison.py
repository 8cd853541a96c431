"""The table of a comparison: which agents learn how fast, and how well in the end.

All begin with the same seeds, so a seed is what is independent: intervals are over
seeds, and differences are taken seed by seed. The middle half of the seeds counts (IQM,
arXiv:2108.13264), so that one that is lucky does not decide.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxplan.eval.stats import bootstrap, interquartile_mean, show_interval
from jaxplan.eval.sweep import Point, show_value

_END = 4  # a run's end is the last so many'th of its iterations
_CURVES = {"return": "env/return", "plan_rate": "rollout/plan_rate"}


def summarise_seeds(
    point: Point,
    metrics: Mapping[str, Float[np.ndarray, "iterations seeds"]],
    first: Mapping[str, Any] | None,
    confidence: float,
) -> dict[str, Any]:
    """One row of the table.

    Args:
        point: what was set.
        metrics: of training, by name; NaN where an iteration had nothing to tell.
        first: the row the others are compared with; None for itself.
        confidence: of the intervals.

    Returns:
        The values; of ``return`` (of episodes, without plan cost) and ``plan_rate`` the
        mean over all iterations (``whole``) and over the last quarter (``end``): each
        seed's, and their IQM with its interval; ``first_minus_it``, the same of the
        differences in return.
    """
    row: dict[str, Any] = {"values": dict(point.values)}
    for name, metric in _CURVES.items():
        curve = np.asarray(metrics[metric], float)
        end = curve[-max(1, len(curve) // _END) :]
        row[name] = {
            when: _over_seeds(np.nanmean(part, axis=0), confidence)
            for when, part in (("whole", curve), ("end", end))
        }
    base = (first or row)["return"]
    row["first_minus_it"] = {
        when: _over_seeds(np.array(base[when]["by_seed"]) - own["by_seed"], confidence)
        for when, own in row["return"].items()
    }
    return row


def _over_seeds(
    by_seed: Float[np.ndarray, " seeds"], confidence: float
) -> dict[str, Any]:
    interval = bootstrap(by_seed, confidence, statistic=interquartile_mean)
    return {"iqm": interval.to_json(), "by_seed": by_seed.tolist()}


def write_comparison(
    rows: Sequence[dict[str, Any]], about: Mapping[str, Any], folder: Path
) -> str:
    """Write ``result.json``.

    Args:
        rows: of ``summarise_seeds``.
        about: what else is to be known of the result: commit, hardware, seconds.
        folder: made if missing.

    Returns:
        The table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result = {**about, "rows": list(rows)}
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    return format_comparison(rows)


def format_comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows of ``summarise_seeds`` as a Markdown table."""
    keys = list(rows[0]["values"])
    head = [
        *keys,
        "return, whole run",
        "first minus it",
        "return, last quarter",
        "first minus it",
        "worst seed",
        "plan rate",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        whole, end = (row["return"][when] for when in ("whole", "end"))
        behind = row["first_minus_it"]
        lines.append(
            [
                *(show_value(row["values"][key]) for key in keys),
                show_interval(whole["iqm"], form=".3f"),
                show_interval(behind["whole"]["iqm"], form=".3f"),
                show_interval(end["iqm"], form=".3f"),
                show_interval(behind["end"]["iqm"], form=".3f"),
                f"{min(end['by_seed']):.3f}",
                show_interval(row["plan_rate"]["end"]["iqm"], form=".3f"),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
