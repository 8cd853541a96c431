"""The report as one HTML file that needs no network: data, style and drawing inlined.

What is drawn, and how, is in ``templates``; here the data are made small and safe.
"""

import importlib.resources
import json
import string
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxplan.io.metrics import Row, metric_names

_SCRIPTS = ("charts.js", "replay.js", "report.js")
_MOST_POINTS = 300  # of a curve; more are averaged in bins

# What is shown first of a stage; the rest is folded away.
_MAIN = (
    "sft/loss",
    "sft/loss_action",
    "sft/loss_plan",
    "sft/loss_decide",
    "sft/accuracy_decide",
    "env/return",
    "env/achievements",
    "rollout/plan_rate",
    "rollout/plan_tokens_per_turn",
    "ppo/approx_kl_decide",
    "ppo/approx_kl_plan",
    "ppo/approx_kl_action",
    "ppo/decide_entropy",
    "ppo/explained_variance",
    "rollout/env_steps_per_second",
    "rollout/legal_mass",
)
# Drawn dashed in the chart of the same metric on training data.
_HELD_OUT = ("held_out_", "validation_")


def render_page(
    summary: Mapping[str, Any], rows: Iterable[Row], replay: Mapping[str, Any] | None
) -> str:
    """Build the page.

    Args:
        summary: what ``summary.json`` holds.
        rows: of ``metrics.jsonl``.
        replay: one episode, see `check_replay`; without one its section is left out.
    """
    data = {"summary": summary, "curves": make_curves(rows), "replay": replay}
    # "<" is escaped, so that no text in the data can end the script element.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    return string.Template(_template("report.html")).substitute(
        TITLE=_escape(summary["config"].get("name", "run")),
        STYLE=_template("report.css"),
        DATA=text,
        SCRIPT="\n".join(_template(name) for name in _SCRIPTS),
    )


def check_replay(replay: Mapping[str, Any]) -> None:
    """Find what the page could not draw before it is a blank page.

    Args:
        replay: ``arm``, ``mode``, ``seed``, ``action_names``, ``event_names`` and
            ``frames``, each with the keys of `_FRAME`; what else there is draws the
            picture (``Drawn``).

    Raises:
        ValueError: naming what is missing or wrong, and in which frame.
    """
    missing = [key for key in _REPLAY if key not in replay]
    if missing:
        raise ValueError(f"replay: missing {missing}")
    if not replay["frames"]:
        raise ValueError("replay: no frames")
    for number, frame in enumerate(replay["frames"]):
        missing = [key for key in _FRAME if key not in frame]
        if missing:
            raise ValueError(f"replay: frame {number} misses {missing}")
        unknown = set(frame["unlocked"]) - set(replay["event_names"])
        if unknown:
            raise ValueError(f"replay: frame {number} unlocks unknown {unknown}")
    if "tile_names" in replay:
        _check_views(replay)


def _check_views(replay: Mapping[str, Any]) -> None:
    shape = np.shape(replay["frames"][0]["view"])
    for number, frame in enumerate(replay["frames"]):
        view = np.asarray(frame["view"])
        if view.ndim != 2 or view.shape != shape:
            raise ValueError(
                f"replay: frame {number} has a view of shape {view.shape}, "
                f"the first {shape}"
            )
        if view.min() < 0 or view.max() >= len(replay["tile_names"]):
            raise ValueError(
                f"replay: frame {number} has tiles {view.min()} to {view.max()}, "
                f"there are {len(replay['tile_names'])} names"
            )


_REPLAY = ("arm", "mode", "seed", "action_names", "event_names", "frames")
_FRAME = (
    "step",
    "action",
    "plan",
    "planned_now",
    "reward",
    "unlocked",
    "achievements",
    "observation",
)


def make_curves(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Sort metrics into charts.

    Returns:
        One entry a stage in the order they ran: ``stage``, and the charts ``main`` and
        ``rest``, each a ``name`` and ``lines`` of (step, value) points.
    """
    stages: dict[str, dict[str, list[tuple[int, float | None]]]] = {}
    for row in rows:
        metrics = stages.setdefault(row["stage"], {})
        for name in metric_names(row):
            metrics.setdefault(name, []).append((row["step"], row[name]))
    return [
        {"stage": stage, **_sort_charts(metrics)} for stage, metrics in stages.items()
    ]


def _sort_charts(metrics: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    charts: dict[str, dict[str, Any]] = {}
    for name in sorted(metrics, key=_is_held_out):
        place = charts.setdefault(_training_name(name, metrics), {"lines": []})
        place["lines"].append(_thin(metrics[name]))
    named = [{"name": name, **chart} for name, chart in charts.items()]
    main = [chart for name in _MAIN for chart in named if chart["name"] == name]
    rest = sorted((c for c in named if c not in main), key=lambda c: c["name"])
    return {"main": main, "rest": rest} if main else {"main": rest, "rest": []}


def _is_held_out(name: str) -> bool:
    return name.partition("/")[2].startswith(_HELD_OUT)


def _training_name(name: str, metrics: dict[str, Any]) -> str:
    """Name the chart a metric belongs to: ``sft/held_out_loss`` to ``sft/loss``."""
    group, _, rest = name.partition("/")
    for prefix in _HELD_OUT:
        other = f"{group}/{rest.removeprefix(prefix)}"
        if rest.startswith(prefix) and other in metrics:
            return other
    return name


def _thin(points: list[tuple[int, float | None]]) -> list[list[Any]]:
    """Average long curves in bins of equal length; unknown values are left out."""
    known = [(step, value) for step, value in points if value is not None]
    width = -(-len(known) // _MOST_POINTS)
    if width <= 1:
        return [[step, value] for step, value in known]
    bins = [known[i : i + width] for i in range(0, len(known), width)]
    return [
        [part[-1][0], float(np.mean([value for _, value in part]))] for part in bins
    ]


def _template(name: str) -> str:
    folder = importlib.resources.files("jaxplan.eval") / "templates"
    return (folder / name).read_text(encoding="utf-8")


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
