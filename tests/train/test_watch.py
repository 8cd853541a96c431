"""Warnings: when they come, how often, and that they say what to change."""

from jaxplan.config.schema import PpoConfig
from jaxplan.train.watch import Watch

GOOD = {
    "ppo/decide_entropy": 0.4,
    "rollout/plan_rate": 0.3,
    "ppo/ratio_error_outside_plan": 0.0,
    "ppo/explained_variance": 0.2,
}


def said(rows):
    watch = Watch(PpoConfig(plan_cost=0.07))
    return [watch.warnings(number, row) for number, row in enumerate(rows)]


def test_a_healthy_run_is_silent():
    assert said([GOOD] * 30) == [[]] * 30


def test_a_collapsed_decision_is_told_once_an_interval_with_its_remedy():
    found = said([GOOD | {"ppo/decide_entropy": 0.001}] * 41)
    assert [number for number, texts in enumerate(found) if texts] == [0, 20, 40]
    assert "plan_rate=30.0%" in found[0][0]
    assert "ppo.decide_explore" in found[0][0]
    assert "plan_cost=0.07" in found[0][0]


def test_a_ratio_error_names_the_role_it_is_worst_in():
    row = {"ppo/ratio_error_outside_plan": 0.02, "ppo/ratio_error_outside_action": 0.08}
    [[text]] = said([GOOD | row])
    assert "ppo/ratio_error_outside_action=8.0%" in text
    assert "model.compute_dtype" in text


def test_a_critic_may_be_bad_for_some_iterations_but_not_for_five():
    bad = GOOD | {"ppo/explained_variance": -0.5}
    assert said([bad] * 4 + [GOOD] + [bad] * 4) == [[]] * 9
    found = said([bad] * 5)
    assert found[:4] == [[]] * 4
    assert "below 0 for 5 iterations" in found[4][0]


def test_updates_that_were_not_made_are_told():
    [[text]] = said([GOOD | {"ppo/skipped_updates": 2.0}])
    assert "ppo/skipped_updates=2" in text
    assert "learning_rate" in text


def test_a_mode_without_a_decision_is_no_collapse():
    row = {name: value for name, value in GOOD.items() if "decide" not in name}
    assert said([row] * 3) == [[]] * 3


def test_causes_do_not_silence_each_other():
    row = GOOD | {"ppo/decide_entropy": 0.0, "ppo/ratio_error_outside_plan": 0.5}
    assert len(said([row])[0]) == 2
