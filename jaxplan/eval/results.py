"""What an experiment found, kept beside its config, and the tables made of it.

A finished run becomes ``result.json``; every table of the README is written from such
files, between two comments that name the file and the kind of table, so that no number
is typed by hand.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from jaxplan.eval.comparison import format_comparison
from jaxplan.eval.pairs import Pairs, compare_modes, format_pairs
from jaxplan.eval.priming import format_guided, format_priming
from jaxplan.eval.report import format_table
from jaxplan.eval.scripted import format_play
from jaxplan.eval.sweep import format_sweep
from jaxplan.io.metrics import Row, read_metrics
from jaxplan.io.rundir import is_kept, marker

_BLOCK = re.compile(
    r"(?P<begin><!-- (?P<kind>\w+) of (?P<path>\S+) -->\n).*?(?P<end><!-- end -->)",
    re.DOTALL,
)
_GIB = 2**30


def result_path(config: Path) -> Path:
    """Where the result of a config file lies.

    ``result.json`` in the folder of an experiment (``config.yaml``), else a file with
    the config's own name.
    """
    alone = config.name == "config.yaml"
    return config.with_name("result.json" if alone else f"{config.stem}.result.json")


def keep_result(run_dir: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Reduce a finished run to what is kept of it.

    Args:
        run_dir: its directory, or that of a sweep, a comparison or the priming
            experiment, which have written what is to be kept themselves.
        config: what the experiment's config file says, as plain data.

    Raises:
        FileNotFoundError: the run has no report.
        ValueError: the run had another config, or was not made as a whole by one commit
            without changes.
    """
    table = run_dir / "result.json"
    if table.exists():
        return _keep_table(table, config)
    path = run_dir / "report" / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the run has not finished")
    summary = json.loads(path.read_text(encoding="utf-8"))
    other = _differences(summary["config"], config)
    if other:
        raise ValueError(f"{run_dir}: its config differs from the file's in {other}")
    made_by = _commits(run_dir, summary)
    if len({*made_by.values()}) > 1 or not is_kept(summary["commit"]):
        told = ", ".join(
            f"{stage} by {name or 'an unknown commit'}"
            for stage, name in made_by.items()
        )
        raise ValueError(
            f"{run_dir}: made {told}; commit first and let one commit make every "
            "stage, so that the result can be made again"
        )
    kept = ("commit", "versions", "hardware", "wall_seconds", "results")
    return {
        "name": config["name"],
        "seed": config["seed"],
        **{key: summary[key] for key in kept},
        "pairs": _pairs(run_dir, summary),
        "measured": _measured(run_dir, read_metrics(run_dir)),
    }


def _keep_table(table: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    result = json.loads(table.read_text(encoding="utf-8"))
    about, commit = config["about"], result["commit"]
    if any(result[key] != about[key] for key in ("question", "run")):
        raise ValueError(f"{table} answers {result['question']!r}, not the config's")
    for name in (commit, result.get("students_commit", commit)):
        if "," in str(name) or not is_kept(name):
            raise ValueError(
                f"{table}: made by {name or 'an unknown commit'}; commit first and let "
                "one commit make every run, so that the result can be made again"
            )
    return result


def _pairs(run_dir: Path, summary: Mapping[str, Any]) -> dict[str, Pairs]:
    """The plan modes of every arm that played more than one, world by world."""
    pairs = {}
    for arm in dict.fromkeys(row["arm"] for row in summary["results"]):
        file = marker(run_dir, f"evaluate-{arm}")
        played = json.loads(file.read_text(encoding="utf-8"))
        episodes = played.get("episodes", {})
        if len(episodes) > 1:
            confidence = summary["config"]["evaluate"]["confidence"]
            pairs[arm] = compare_modes(episodes, confidence)
    return pairs


def _commits(run_dir: Path, summary: Mapping[str, Any]) -> dict[str, str | None]:
    """Who made each stage; None made those that tell of no commit or did not finish."""
    markers = (run_dir / "stages").glob("*.json")
    found = {
        file.stem: json.loads(file.read_text(encoding="utf-8")) for file in markers
    }
    stages = dict.fromkeys((*summary["config"]["stages"], *sorted(found), "report"))
    told = {stage: found.get(stage, {}).get("commit") for stage in stages}
    return told | {"report": summary["commit"]}


def _differences(one: Any, other: Any, key: str = "") -> list[str]:
    """Keys with other values; a key that only one knows came or went with the code."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = sorted(one.keys() & other.keys())
        parts = [
            _differences(one[name], other[name], f"{key}.{name}".lstrip("."))
            for name in names
            if name != "run_root"
        ]
        return [difference for part in parts for difference in part]
    return [] if one == other else [key]


def _measured(run_dir: Path, rows: list[Row]) -> dict[str, float]:
    """Speeds, memory and text lengths of a run, as far as it has them."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows if name in row]

    reductions: dict[str, tuple[str, Callable[[list[float]], float]]] = {
        "env_steps_per_second": ("rollout/env_steps_per_second", median),
        "tokens_per_second": ("rollout/tokens_per_second", median),
        "sft_tokens_per_second": ("sft/tokens_per_second", median),
        "peak_gib": ("memory/peak_bytes", lambda values: max(values) / _GIB),
        "ratio_error": ("ppo/ratio_error", max),
    }
    measured = {
        name: reduce(column(source))
        for name, (source, reduce) in reductions.items()
        if column(source)
    }
    card = run_dir / "dataset" / "card.json"
    if card.exists():
        told = json.loads(card.read_text(encoding="utf-8"))
        names = ("tokens_per_observation", "tokens_per_plan", "achievements_mean")
        measured |= {name: told[name] for name in names}
    return measured


def table_of_rows(result: Mapping[str, Any]) -> str:
    """Every arm and plan mode, aligned text."""
    return f"```\n{format_table(result['results'])}```\n"


def table_of_pairs(result: Mapping[str, Any]) -> str:
    """Plan modes against each other, world by world, a Markdown table."""
    return f"\n{format_pairs(result['pairs'])}\n"


def table_of_play(result: Mapping[str, Any]) -> str:
    """What the scripted expert unlocks, when, and how long its plans live."""
    (row,) = (row for row in result["results"] if "plan_life" in row)
    return f"```\n{format_play(row)}```\n"


def table_of_measures(result: Mapping[str, Any]) -> str:
    """Where and how fast it ran, a Markdown table."""
    wall, measured = result["wall_seconds"], result["measured"]
    stages = {name: s for name, s in wall.items() if name != "compile" and s}
    lines = [
        ("seed, commit", f"{result['seed']}, {result['commit']}"),
        ("hardware", result["hardware"]),
        ("all stages", f"{sum(stages.values()) / 60:.1f} minutes"),
        (
            f"wall seconds: {', '.join(stages)}",
            ", ".join(f"{seconds:.0f}" for seconds in stages.values()),
        ),
        ("of these, tracing and compiling", f"{wall['compile']:.0f}"),
    ]
    told = {
        "peak memory": ("{peak_gib:.1f} GiB of the process", ["peak_gib"]),
        "rollout in PPO, median": (
            "{env_steps_per_second:,.0f} env steps/s, {tokens_per_second:,.0f} "
            "tokens/s",
            ["env_steps_per_second", "tokens_per_second"],
        ),
        "imitation, median": (
            "{sft_tokens_per_second:,.0f} tokens/s",
            ["sft_tokens_per_second"],
        ),
        "ratio error, maximum": ("{ratio_error:.1e}", ["ratio_error"]),
        "tokens of an observation, of a plan, mean": (
            "{tokens_per_observation:.1f}, {tokens_per_plan:.1f}",
            ["tokens_per_observation", "tokens_per_plan"],
        ),
    }
    for name, (pattern, needed) in told.items():
        if all(key in measured for key in needed):
            lines.append((name, pattern.format(**measured)))
    body = "".join(f"| {name} | {value} |\n" for name, value in lines)
    return f"\n| one run | measured |\n|---|---|\n{body}\n"


def table_of_points(result: Mapping[str, Any]) -> str:
    """The points of a comparison (scripts/compare.py), a Markdown table."""
    return f"\n{format_comparison(result['rows'])}\n"


def table_of_students(result: Mapping[str, Any]) -> str:
    """All tables of the priming experiment (scripts/prime.py), Markdown."""
    return f"\n{format_priming(result)}\n"


def table_of_guided(result: Mapping[str, Any]) -> str:
    """Its students with the help of their teacher, Markdown tables."""
    return f"\n{format_guided(result)}\n"


def table_of_sweep(result: Mapping[str, Any]) -> str:
    """The points of a sweep (scripts/sweep.py), a Markdown table."""
    return f"\n{format_sweep(result['rows'])}\n"


TABLES = {
    "rows": table_of_rows,
    "pairs": table_of_pairs,
    "play": table_of_play,
    "measures": table_of_measures,
    "points": table_of_points,
    "students": table_of_students,
    "guided": table_of_guided,
    "sweep": table_of_sweep,
}


def fill_tables(text: str, root: Path) -> str:
    """Write every table of a Markdown text anew.

    Args:
        text: with blocks ``<!-- KIND of PATH -->`` … ``<!-- end -->``.
        root: what the paths of results are relative to.

    Raises:
        FileNotFoundError: a result is missing.
        ValueError: a block names no kind of table.
    """

    def fill(block: re.Match[str]) -> str:
        kind, path = block["kind"], root / block["path"]
        if kind not in TABLES:
            raise ValueError(
                f"<!-- {kind} of {block['path']} -->: no such table; there are "
                f"{', '.join(TABLES)}"
            )
        result = json.loads(path.read_text(encoding="utf-8"))
        return block["begin"] + TABLES[kind](result) + block["end"]

    return _BLOCK.sub(fill, text)
