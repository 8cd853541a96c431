"""What a run found: results with intervals, ``summary.json``, the page, the table."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from jaxtyping import Bool, Num
from rich.console import Console
from rich.table import Table

from jaxplan.eval.page import check_replay, render_page
from jaxplan.eval.stats import bootstrap, show_interval
from jaxplan.io.metrics import read_metrics

Result = dict[str, Any]

METRICS = ("achievements", "return", "plan_rate", "plan_tokens_per_turn", "steps")

_SUMMARY = ("config", "commit", "versions", "hardware", "wall_seconds", "results")
_WALL = ("collect", "sft", "ppo", "evaluate", "compile")


def make_result(
    arm: str,
    mode: str,
    episodes: Mapping[str, Num[np.ndarray, " episodes"]],
    counts: Mapping[str, Num[np.ndarray, " episodes"]],
    unlocked: Bool[np.ndarray, "episodes events"],
    event_names: Sequence[str],
    confidence: float = 0.95,
) -> Result:
    """Reduce the episodes of one arm in one plan mode to a row of the results.

    Args:
        arm: who played.
        mode: its plan mode.
        episodes: one number an episode for each of `METRICS`; ``plan_rate`` is the
            share of turns with a plan, ``plan_tokens_per_turn`` counts over all turns.
        counts: one number an episode for each thing the world counts besides.
        unlocked: which events happened in which episode.
        event_names: of the events.
        confidence: of the bootstrap intervals.
    """
    return {
        "arm": arm,
        "mode": mode,
        "episodes": len(unlocked),
        **{name: bootstrap(episodes[name], confidence).to_json() for name in METRICS},
        "counts": {
            name: bootstrap(counts[name], confidence).to_json() for name in counts
        },
        **_over_events(unlocked, event_names),
    }


def _over_events(
    unlocked: Bool[np.ndarray, "episodes events"], event_names: Sequence[str]
) -> dict[str, Any]:
    if len(unlocked) == 0:
        return {"score": None, "per_event": None}
    rates = unlocked.mean(axis=0)
    per_event = dict(zip(event_names, rates.tolist(), strict=True))
    score = crafter_score(rates) if per_event else None
    return {"score": score, "per_event": per_event}


def crafter_score(success_rates: Num[np.ndarray, " events"]) -> float:
    """Crafter's score: exp(mean(ln(1 + s))) - 1, s in percent (arXiv:2109.06780).

    Args:
        success_rates: share of episodes in which each event happened, 0 to 1.

    Returns:
        0 to 100.
    """
    return float(np.expm1(np.mean(np.log1p(100 * success_rates))))


def write_report(
    run_dir: Path | str,
    summary: Mapping[str, Any],
    replay: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``report/summary.json`` and ``report/index.html``.

    Args:
        run_dir: the run directory; the curves come from its ``metrics.jsonl``.
        summary: ``config`` (as plain data), ``commit``, ``versions``, ``hardware``,
            ``wall_seconds`` (by stage, and ``compile``; null for what did not run) and
            ``results`` (see `make_result`).
        replay: one episode to look at, see `page.check_replay`.

    Returns:
        The page.

    Raises:
        ValueError: a key is missing or unknown, or the replay cannot be drawn.
    """
    _check_keys("summary", summary, _SUMMARY)
    _check_keys("summary: wall_seconds", summary["wall_seconds"], _WALL)
    if replay is not None:
        check_replay(replay)
    folder = Path(run_dir) / "report"
    folder.mkdir(exist_ok=True)
    text = json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False)
    _write(folder / "summary.json", text + "\n")
    page = render_page(summary, read_metrics(run_dir), replay)
    _write(folder / "index.html", page)
    return folder / "index.html"


def print_table(results: Sequence[Result], stream: TextIO | None = None) -> None:
    """Print the results: a drawn table on a terminal, aligned text elsewhere."""
    stream = stream or sys.stdout
    if not stream.isatty():
        stream.write(format_table(results))
        return
    head, rows = _table(results)
    table = Table(*head, title="results: mean [interval] over episodes")
    for column in table.columns[2:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(file=stream).print(table)


def format_table(results: Sequence[Result]) -> str:
    """Write the results as aligned text."""
    head, rows = _table(results)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    ]
    return "".join(line.rstrip() + "\n" for line in lines)


def _table(
    results: Sequence[Result],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    head = ("arm", "mode", *METRICS, *results[0]["counts"])
    return head, [_cells(result) for result in results]


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result["arm"],
        result["mode"],
        show_interval(result["achievements"]),
        show_interval(result["return"]),
        show_interval(result["plan_rate"], ".1%"),
        show_interval(result["plan_tokens_per_turn"]),
        show_interval(result["steps"], ".0f"),
        *(show_interval(count) for count in result["counts"].values()),
    )


def _check_keys(where: str, found: Mapping[str, Any], wanted: Sequence[str]) -> None:
    missing, unknown = set(wanted) - set(found), set(found) - set(wanted)
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {sorted(missing)}, unknown {sorted(unknown)}"
        )


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
