"""The table of a sweep, from runs written by hand."""

import json

import numpy as np
import pytest

from jaxplan.config.schema import SweepConfig
from jaxplan.eval.sweep import (
    Point,
    collapse,
    points,
    read_rows,
    show_value,
    summarise_point,
    write_sweep,
)

SWEEP = SweepConfig(
    axes=(
        ("ppo.plan_cost", (0, 0.05)),
        ("ppo.mode", ("dynamic", "never")),
    )
)


def write_run(
    folder,
    returns,
    plan_tokens,
    plan_rates,
    worlds=(7, 8),
    arm="sft+rl",
    told="",
    commit="abc",
):
    (folder / "stages").mkdir(parents=True)
    episodes = {
        "seed": list(worlds),
        "unlocked": [[0], [0, 2]],
        "return": returns,
        "alive": [1, 0],
        "steps": [10, 20],
        "plan_tokens": plan_tokens,
    }
    marker = folder / "stages" / f"evaluate-{arm}.json"
    results = [{"mode": "dynamic", "plan_rate": {"mean": 0.25}}]
    played = {"results": results, "episodes": {"dynamic": episodes}, "commit": commit}
    marker.write_text(json.dumps(played))
    lines = [
        {"stage": "ppo", "step": n, "time": 0.0, f"rollout/plan_rate{told}": rate}
        for n, rate in enumerate(plan_rates)
    ]
    metrics = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(metrics)
    return folder


def test_points_are_all_combinations():
    names = [point.name for point in points(SWEEP)]
    assert names == [
        "plan_cost=0-mode=dynamic",
        "plan_cost=0-mode=never",
        "plan_cost=0.05-mode=dynamic",
        "plan_cost=0.05-mode=never",
    ]
    last = list(points(SWEEP))[-1]
    assert last.overrides == ["ppo.plan_cost=0.05", "ppo.mode=never"]


def test_points_of_keys_with_one_last_word_are_told_apart():
    coefficients = Point({"ppo.kl_coef.decide": 0.0, "ppo.ent_coef.decide": 0.5})
    assert coefficients.name == "kl_coef.decide=0-ent_coef.decide=0.5"
    nested = Point({"seed": 1.0, "evaluate.seed": 2.0, "ppo.gamma": 0.9})
    assert nested.name == "seed=1-evaluate.seed=2-gamma=0.9"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"),
        (0.01, "0.01"),
        (1e-5, "1e-05"),
        (0.12345678, "0.12345678"),
        (1234567.0, "1234567"),
        ("[a/b]", "[a/b]"),
    ],
)
def test_values_keep_their_digits(value, shown):
    assert show_value(value) == shown
    assert Point({"ppo.x": value}).overrides == [f"ppo.x={shown}"]


def test_the_name_of_a_point_is_one_folder_whatever_its_values():
    assert Point({"env.probe.kinds": "[plan, a/b]"}).name == "kinds=_plan_a_b_"


def test_a_row_averages_seeds_before_worlds(tmp_path):
    point = next(points(SWEEP))
    runs = [
        write_run(tmp_path / "0", [1.0, 3.0], [5, 20], [0.2, 0.1]),
        write_run(tmp_path / "1", [2.0, 6.0], [0, 10], [0.2, 0.0, 0.001]),
    ]
    row = summarise_point(point, runs, "sft+rl", "dynamic", 0.95)
    assert row["return"]["mean"] == pytest.approx(3.0)
    assert row["return"]["low"] == pytest.approx(1.5)  # of the worlds 1.5 and 4.5
    assert row["return"]["high"] == pytest.approx(4.5)
    assert row["return_by_seed"] == [2.0, 4.0]
    assert row["events"]["mean"] == 1.5
    tokens = np.mean([[5 / 10, 20 / 20], [0, 10 / 20]])
    assert row["plan_tokens_per_step"]["mean"] == pytest.approx(tokens)
    assert row["plan_rate_by_seed"] == [0.25, 0.25]
    assert row["collapse"] == [None, {"to": "never", "iteration": 1}]
    assert row["first_minus_it"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    better = [write_run(tmp_path / "2", [2.0, 4.0], [5, 20], [], commit="def")]
    own = summarise_point(point, better, "sft+rl", "dynamic", 0.95, None, row)
    assert own["first_minus_it"] == {"mean": 0.0, "low": -1.0, "high": 2.0}
    assert row["commits"] == ["abc"]
    assert own["commits"] == ["def"]


def test_a_row_of_an_agent_that_is_told_prices_is_of_one_of_them(tmp_path):
    own = {"arm": "sft+rl@0.5", "told": "_at_0.5"}
    run = write_run(tmp_path, [1.0, 3.0], [5, 20], [0.2, 0.0], **own)
    row = summarise_point(Point({}), [run], "sft+rl", "dynamic", 0.95, 0.5)
    assert row["values"] == {"plan.prices": 0.5}
    assert row["return"]["mean"] == 2.0
    assert row["collapse"] == [{"to": "never", "iteration": 1}]


def test_seeds_that_played_other_worlds_are_refused(tmp_path):
    runs = [
        write_run(tmp_path / "0", [1.0, 3.0], [5, 20], []),
        write_run(tmp_path / "1", [2.0, 6.0], [0, 10], [], worlds=(7, 9)),
    ]
    with pytest.raises(ValueError, match="played different worlds"):
        summarise_point(next(points(SWEEP)), runs, "sft+rl", "dynamic", 0.95)


def test_a_collapse_is_one_that_lasts():
    assert collapse([0.5, 0.0, 0.3]) is None
    assert collapse([0.5, 0.0, 0.005]) == {"to": "never", "iteration": 1}
    assert collapse([1.0, 0.995]) == {"to": "always", "iteration": 0}
    assert collapse([]) is None


def test_table_and_figure_are_written(tmp_path):
    run = write_run(tmp_path / "0", [1.0, 3.0], [5, 20], [0.0])
    rows = [
        summarise_point(point, [run], "sft+rl", "dynamic", 0.95)
        for point in list(points(SWEEP))[::2]
    ]
    table = write_sweep(rows, {"commit": "abc"}, tmp_path / "out")
    lines = table.splitlines()
    assert lines[0] == (
        "| ppo.plan_cost | ppo.mode | return [over worlds] "
        "| first minus it [over seeds and worlds] | by seed "
        "| events [over worlds] | plan tokens a step [over worlds] "
        "| plan rate by seed | collapse |"
    )
    assert lines[3].startswith(
        "| 0.05 | dynamic | 2.00 [1.00, 3.00] | 0.00 [0.00, 0.00] | 2.00 |"
    )
    assert lines[3].endswith("| 0.25 | never from 0 |")
    assert (tmp_path / "out" / "table.md").read_text() == table
    kept = json.loads((tmp_path / "out" / "result.json").read_text())
    short = [
        {
            key: value
            for key, value in row.items()
            if "world" not in key or key == "worlds"
        }
        for row in rows
    ]
    for row in short:
        del row["returns"]
    assert kept == {"commit": "abc", "rows": short}
    assert (tmp_path / "out" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    write_sweep(rows, {}, tmp_path / "both", tmp_path / "out" / "result.json")
    alone, beside = (
        (tmp_path / folder / "pareto.png").read_bytes() for folder in ("out", "both")
    )
    assert beside.startswith(b"\x89PNG")
    assert beside != alone


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [1]}', '{"rows": [{}]}'])
def test_what_is_no_result_of_a_sweep_cannot_be_drawn_beside_one(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError, match="that a sweep has written"):
        read_rows(tmp_path / "result.json")
