"""Plan modes of one agent, compared world by world."""

import pytest

from jaxplan.eval.pairs import compare_modes, format_pairs


def episodes(*numbers, worlds=(7, 8, 9)):
    return {"seed": list(worlds), "unlocked": [list(range(n)) for n in numbers]}


def test_a_difference_is_taken_world_by_world():
    pairs = compare_modes(
        {"never": episodes(1, 5, 9), "every-2": episodes(2, 6, 10)}, 0.95
    )
    assert pairs == {"never": {"every-2": {"mean": -1.0, "low": -1.0, "high": -1.0}}}


def test_every_mode_meets_those_behind_it():
    pairs = compare_modes(
        {mode: episodes(n, 1, 2) for n, mode in enumerate("abc")}, 0.95
    )
    assert {mode: list(others) for mode, others in pairs.items()} == {
        "a": ["b", "c"],
        "b": ["c"],
    }
    table = format_pairs({"sft": pairs}).splitlines()
    assert table[0] == "| arm | achievements of | minus b | minus c |"
    assert table[2].startswith("| sft | a | -0.33 [-1.00, 0.00] | -0.67 [")
    assert table[3].startswith("| sft | b |  | -0.33 [")


def test_modes_that_played_other_worlds_are_refused():
    with pytest.raises(ValueError, match="a, b played different worlds"):
        compare_modes({"a": episodes(1), "b": episodes(1, worlds=(1, 2, 3))}, 0.95)
