"""The table of a comparison, from curves written by hand."""

import json

import numpy as np
import pytest

from jaxplan.eval.comparison import summarise_seeds, write_comparison
from jaxplan.eval.sweep import Point

NAN = np.nan


def curves(returns, rate=0.5):
    returns = np.array(returns, float)
    return {"env/return": returns, "rollout/plan_rate": np.full(returns.shape, rate)}


# Eight iterations of four seeds, of which the last two iterations are the end.
FIRST = curves([[0, 0, 0, 0]] * 6 + [[NAN, 2, 3, 9], [1, 2, 3, 9]])
SECOND = curves([[0, 0, 0, 0]] * 6 + [[1, 1, 2, 2]] * 2, rate=0.25)


def rows():
    first = summarise_seeds(Point({"ppo.estimator": "turn"}), FIRST, None, 0.95)
    second = summarise_seeds(Point({"ppo.estimator": "grpo"}), SECOND, first, 0.95)
    return [first, second]


def test_the_middle_half_of_the_seeds_counts_and_missing_iterations_do_not():
    first, _ = rows()
    assert first["return"]["end"]["by_seed"] == [1, 2, 3, 9]
    assert first["return"]["end"]["iqm"]["mean"] == 2.5
    assert first["return"]["whole"]["by_seed"] == [1 / 7, 0.5, 0.75, 2.25]
    assert first["return"]["whole"]["iqm"]["mean"] == pytest.approx(0.625)
    assert first["plan_rate"]["whole"]["iqm"]["mean"] == 0.5


def test_differences_are_taken_seed_by_seed():
    first, second = rows()
    assert first["first_minus_it"]["end"]["by_seed"] == [0, 0, 0, 0]
    assert second["first_minus_it"]["end"]["by_seed"] == [0, 1, 1, 7]
    interval = second["first_minus_it"]["end"]["iqm"]
    assert interval["mean"] == 1
    assert interval["low"] <= 1 <= interval["high"]


def test_table_and_result_are_written(tmp_path):
    table = write_comparison(rows(), {"seeds": 4}, tmp_path / "out")
    lines = table.splitlines()
    assert lines[0].startswith("| ppo.estimator | return, whole run | first minus it |")
    assert lines[3].startswith("| grpo | 0.375 [")
    assert lines[3].endswith("| 1.000 | 0.250 [0.250, 0.250] |")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["seeds"] == 4
    assert [row["values"]["ppo.estimator"] for row in result["rows"]] == [
        "turn",
        "grpo",
    ]
