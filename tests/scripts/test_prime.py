"""The priming experiment on its smallest sizes."""

import json

import pytest

from tests.scripts.test_collect import start


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--seeds", "0"], "'0': a number from 1 on is wanted"),
        (["--curve-steps", "none"], "'none': a number from 1 on is wanted"),
        (["name=a/b"], "letters, digits"),
        (["plan.prices=[0,1]"], "plan.prices=[0.0, 1.0]"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, arguments, sentence):
    refused = start("prime.py", tmp_path, *arguments)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_priming_makes_its_table_with_one_command(tmp_path):
    few = (
        "--jobs",
        "2",
        "--seeds",
        "1",
        "--curve-episodes",
        "8",
        "--curve-steps",
        "32",
    )
    # As many worlds as the panel has, so that both are one program.
    sizes = ("env.name=pogs", "collect.styles=[]", "rollout.observation_tokens=64")
    sizes += ("sft.updates=4",)
    asked = ("evaluate.arms=[sft]", "sft.measure_kl=true")
    asked += ("sft.relay.episodes=0",)  # one dataset for all students
    done = start("prime.py", tmp_path, *few, *sizes, *asked)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "tiny" / "result.json").read_text())
    rows = {row["student"]: row for row in result["students"]}
    assert list(rows) == ["dynamic", "naive", "shuffled", "history"]
    assert all(row["updates"] == 4 for row in rows.values())
    assert all(row["start_kl"] > 0 for row in rows.values())
    assert rows["dynamic"]["perplexity_plan"] > 1
    assert rows["naive"]["perplexity_plan"] is None
    assert rows["naive"]["plan_tokens_per_step"]["mean"] == 0
    assert [row["mode"] for row in result["curves"]["naive"]][-1] == "dynamic"
    again = start("prime.py", tmp_path, *few, *sizes, *asked, "--guided")
    assert again.returncode == 0
    assert "sft: done before" in again.stderr
    guided = json.loads((tmp_path / "tiny-guided" / "result.json").read_text())
    assert [row["student"] for row in guided["students"]] == ["dynamic", *rows][:4]
    assert all(row["plan_tokens_per_step"]["mean"] > 0 for row in guided["students"])
    assert guided["curve"]["results"][0]["mode"] == "scripted-1"
    assert "| scripted-1 |" in again.stdout
    assert "| dynamic |" in done.stdout
    assert "tiny-naive-0: sft  4/4" in done.stderr, "side by side"
