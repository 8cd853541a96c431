"""The expert and its tables, by one command."""

import json

import pytest

from tests.scripts.test_collect import start


@pytest.mark.slow
def test_evaluate_plays_the_expert_and_tells_its_tables(tmp_path):
    arms = ("stages=[evaluate,report]", "evaluate.arms=[random,expert]")
    done = start("evaluate.py", tmp_path, *arms, "evaluate.max_steps=120")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "tiny" / "report" / "summary.json").read_text())
    random, expert = summary["results"]
    assert (random["arm"], expert["arm"]) == ("random", "expert")
    assert expert["achievements"]["low"] > random["achievements"]["high"]
    assert expert["median_step"]["collect_wood"] < 60
    assert "unlocked in … of the episodes" in done.stdout
    assert "a plan lives for" in done.stdout


@pytest.mark.slow
def test_an_agent_in_training_is_not_evaluated(tmp_path):
    refused = start("evaluate.py", tmp_path, "evaluate.arms=[random,sft+rl]")
    assert refused.returncode == 2
    assert "tiny: ppo has not finished" in refused.stderr
    assert not list((tmp_path / "tiny").glob("stages/*")), "random was not played"


@pytest.mark.slow
def test_a_stage_that_is_not_in_the_config_is_not_run(tmp_path):
    done = start("evaluate.py", tmp_path, "stages=[collect]")
    assert done.returncode == 2
    assert "has none of evaluate, report" in done.stderr
