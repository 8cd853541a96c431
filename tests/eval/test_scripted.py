"""Plans' lives by hand, and what a scripted arm prints."""

import numpy as np
import pytest

from jaxplan.eval.panels import Episodes
from jaxplan.eval.scripted import (
    ScriptedPlay,
    describe_play,
    format_play,
    goal_lives,
    plan_life,
)


@pytest.mark.parametrize(
    ("goals", "lives"),
    [
        ([], []),
        ([5, 5, 5], [(5, 3)]),
        ([5, 5, 1, 5], [(5, 4)]),  # a fight on the way
        ([5, 1, 1, 1, 5], [(5, 5)]),
        ([5, 1, 1, 1, 1, 5], [(5, 1), (1, 4), (5, 1)]),  # too long to be one
        ([5, 1, 6, 6], [(5, 1), (1, 1), (6, 2)]),  # it did not go on
        ([5, 1, 5, 2, 5], [(5, 5)]),
        ([1, 5, 1, 5], [(1, 3), (5, 1)]),  # from the left
    ],
)
def test_a_goal_lives_until_another_takes_over_for_good(goals, lives):
    assert goal_lives(goals) == lives


def test_the_lives_of_plans_are_told_by_goal():
    episodes = np.array([[0] * 6 + [1] * 4, [1] * 2 + [0] * 5 + [-1] * 3])
    assert plan_life(episodes, ("rest", "work")) == {
        "rest": {
            "share": 11 / 17,
            "plans": 2,
            "mean": 5.5,
            "median": 5.5,
            "p90": 5.9,
        },
        "work": {"share": 6 / 17, "plans": 2, "mean": 3.0, "median": 3.0, "p90": 3.8},
    }


def test_a_scripted_arm_tells_when_and_how_long():
    nothing = np.zeros(3)
    play = ScriptedPlay(
        episodes=Episodes(*[nothing] * 4, {}, *[nothing] * 5),
        unlocked=np.array([[10, -1], [20, -1], [150, -1]]),
        goals=np.zeros((200, 3), int),
    )
    told = describe_play(play, ("dune", "nap"), ("rest",), 0.9)
    assert told["median_step"] == {"dune": 20.0, "nap": None}
    assert list(told["achievements_by_step"]) == ["100"]
    assert told["achievements_by_step"]["100"]["mean"] == pytest.approx(2 / 3)
    assert told["plan_life"]["rest"]["mean"] == 200

    row = {"arm": "expert", "per_event": {"dune": 1.0, "nap": 0.0}}
    lines = format_play({**row, "alive": {"mean": 0.5}, **told}).splitlines()
    assert "  dune                  100.0%     20" in lines
    assert "  nap                     0.0%      -" in lines
    assert any(line.split()[:3] == ["rest", "100.0%", "3"] for line in lines)
