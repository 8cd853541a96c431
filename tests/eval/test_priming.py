"""The table of the priming experiment, from runs written by hand."""

import dataclasses
import json

import numpy as np
import pytest

from jaxplan.eval.priming import (
    format_guided,
    format_priming,
    measure,
    read_student,
    summarise,
    summarise_guided,
)
from jaxplan.eval.report import crafter_score

EVENTS = ("wood", "stone", "iron")


def write_run(folder, unlocked, alive, seeds=(7, 8), **sft):
    episodes = {
        "seed": list(seeds),
        "unlocked": unlocked,
        "return": [0.0] * len(seeds),
        "alive": alive,
        "steps": [10, 20],
        "plan_tokens": [5, 40],
    }
    stages = folder / "stages"
    stages.mkdir(parents=True)
    (stages / "evaluate-sft.json").write_text(
        json.dumps({"results": [], "episodes": {"never": episodes}})
    )
    (stages / "sft.json").write_text(json.dumps({"updates": 3, **sft}))
    return folder


@pytest.fixture
def students(tmp_path):
    def student(name, *runs, **sft):
        paths = [
            write_run(tmp_path / f"{name}-{seed}", *run, **sft)
            for seed, run in enumerate(runs)
        ]
        return read_student(name, paths, "never", len(EVENTS))

    plans = {"sft/held_out_perplexity_plan": 2.0, "sft/held_out_start_kl": 0.5}
    return [
        student(
            "plans", ([[0, 1, 2], [0]], [1, 0]), ([[0, 1], [0, 1]], [1, 1]), **plans
        ),
        student("none", ([[0], []], [0, 0]), ([[0, 2], [0]], [1, 0])),
    ]


def test_worlds_are_averaged_over_seeds_and_compared_one_by_one(students):
    plans, none = summarise(students, EVENTS, 0.9)
    assert plans["seeds"] == plans["worlds"] == 2
    assert plans["achievements"]["mean"] == 2.0
    assert plans["achievements_by_seed"] == [2.0, 2.0]
    assert none["achievements_by_seed"] == [0.5, 1.5]
    # worlds: 2.5 and 1.5 with plans, 1.5 and 0.5 without
    assert none["behind_first"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert plans["behind_first"]["mean"] == 0
    assert plans["alive"]["mean"] == 0.75
    assert plans["plan_tokens_per_step"]["mean"] == pytest.approx((0.5 + 2.0) / 2)
    assert none["per_event"] == {"wood": 0.75, "stone": 0.0, "iron": 0.25}
    assert none["score"]["mean"] == crafter_score(np.array([0.75, 0.0, 0.25]))
    assert none["score"]["low"] <= none["score"]["mean"] <= none["score"]["high"]
    assert plans["perplexity_plan"] == 2.0
    assert none["perplexity_plan"] is None


def test_the_table_has_a_line_for_each_student_achievement_and_mode(students):
    rows = summarise(students, EVENTS, 0.9)
    interval = {"mean": 0.5, "low": 0.25, "high": 0.75}
    names = ("achievements", "plan_rate", "steps")
    curve = [{"mode": "every-2"} | dict.fromkeys(names, interval)]
    text = format_priming({"students": rows, "curves": {"plans": curve}})
    assert "| plans | 2.00 [1.50, 2.50] | 2.00 2.00 | 0.00 [0.00, 0.00] |" in text
    assert "| stone | 75% | 0% |" in text
    assert f"| every-2 |{' 0.50 [0.25, 0.75] |' * 3}" in text
    assert "| - |" in text  # no plans, no perplexity of plans
    often = [curve[0] | {"mode": "scripted-2"}]
    result = {
        "students": summarise_guided(students, [("scripted-4", students[1])], 0.9),
        "curve": {"student": "plans", "results": often},
    }
    text = format_guided(result)
    assert "| none | scripted-4 | 1.00 [0.50, 1.50] | 0.50 1.50 | 0.00 [0.00," in text
    assert f"| scripted-2 |{' 0.50 [0.25, 0.75] |' * 3}" in text


def test_who_is_guided_is_compared_with_itself_alone(students):
    own, better = students
    renamed = dataclasses.replace(better, name=own.name, sft=[])
    (row,) = summarise_guided([better, own], [("prompted-2", renamed)], 0.9)
    assert (row["student"], row["mode"]) == ("plans", "prompted-2")
    assert row["achievements_by_seed"] == [0.5, 1.5]
    assert row["gain"] == {"mean": -1.0, "low": -1.0, "high": -1.0}
    assert row["alive"]["mean"] == 0.25


def test_seconds_are_summed_over_runs_and_speeds_are_medians(tmp_path):
    def mark(name, stages, speeds=()):
        folder = tmp_path / name / "stages"
        folder.mkdir(parents=True)
        for stage, result in stages.items():
            (folder / f"{stage}.json").write_text(json.dumps(result))
        rows = [{"stage": "sft", "sft/tokens_per_second": speed} for speed in speeds]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(text)
        return tmp_path / name

    data = mark("data", {"collect": {"wall_seconds": 5}})
    (data / "dataset").mkdir()
    card = {"turns": 100, "plan_share": 0.25, "env": "shore", "styles": {}}
    (data / "dataset" / "card.json").write_text(json.dumps(card))
    sft = [{"wall_seconds": 20, "padding_share": share} for share in (0.1, 0.3)]
    played = {"evaluate": {"wall_seconds": 7}}
    runs = [
        mark("a", played | {"sft": sft[0]}, [1.0, 9.0]),
        mark("b", played | {"sft": sft[1]}, [5.0]),
        mark("a-curve", played),
    ]
    assert measure(data, runs) == {
        "wall_seconds": {"collect": 5, "sft": 40, "evaluate": 21},
        "dataset": {"turns": 100, "plan_share": 0.25},
        "sft_tokens_per_second": 5.0,
        "padding_share": pytest.approx(0.2),
    }


def test_seeds_that_played_other_worlds_are_refused(tmp_path):
    paths = [
        write_run(tmp_path / "a", [[0], [1]], [1, 1]),
        write_run(tmp_path / "b", [[0], [1]], [1, 1], seeds=(7, 9)),
    ]
    with pytest.raises(ValueError, match="different worlds"):
        read_student("a", paths, "never", len(EVENTS))
