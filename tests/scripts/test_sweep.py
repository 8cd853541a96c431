"""scripts/sweep.py on its smallest sizes."""

import json
import subprocess
import sys

import pytest

from tests.scripts.test_train import ENVIRONMENT, REPOSITORY, TINY

SWEEP = """
name=tiny-sweep sweep.seeds=1 sweep.axes=[[ppo.plan_cost,[0,0.5]]]
sft.relay.episodes=0 evaluate.modes=[dynamic]
""".split()  # noqa: SIM905 (as on the command line)


def sweep(root, *arguments):
    script = str(REPOSITORY / "scripts" / "sweep.py")
    command = [sys.executable, script, "--config", str(TINY), f"run_root={root}"]
    return subprocess.run(
        [*command, *SWEEP, *arguments],
        cwd=root,
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )


def test_the_jobs_are_listed(tmp_path):
    listed = sweep(tmp_path, "--list")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert [line.split()[1] for line in lines] == [
        "tiny-sweep-plan_cost=0-0",
        "tiny-sweep-plan_cost=0.5-0",
    ]
    assert f"ppo.start={tmp_path / 'tiny-sweep-primed-0'}" in lines[1]
    elsewhere = sweep(tmp_path, "--list", "ppo.start=runs/other")
    assert elsewhere.stdout.count("ppo.start=runs/other") == 2
    seeds = sweep(tmp_path, "--list", "seed=7", "sweep.seeds=2").stdout.splitlines()
    assert [line.split()[1] for line in seeds[::2]] == [
        "tiny-sweep-plan_cost=0-7",
        "tiny-sweep-plan_cost=0-8",
    ]
    assert "seed=8" in seeds[-1].split()


def test_agents_that_are_told_prices_need_no_axis(tmp_path):
    listed = sweep(tmp_path, "--list", "plan.prices=[0, 1]", "sweep.axes=[]")
    assert listed.returncode == 0, listed.stderr
    assert listed.stdout.split()[1] == "tiny-sweep-0"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sweep.axes=[]"], "sweep.axes: empty"),
        (["sweep.axes=[[ppo.plan_cots, [1]]]"], "'plan_cost'?"),
        (["sweep.axes=[[sft.updates, [1, 2]]]"], "sft.updates would change nothing"),
        (["sweep.axes=[[seed, [1, 2]]]"], "seed would change nothing"),
        (["sweep.axes=[[ppo.gamma, [0.9, 0.9]]]"], "two points have one name"),
        (["plan.prices=[0, 1]"], "both price a plan token"),
        (["sweep.axes=[[plan.prices, ['[0, 1]']]]"], "told the same prices, here []"),
        (["sweep.beside=none.json"], "sweep.beside: none.json: wanted is the result"),
        (["--index", "2"], "there are 0 to 1"),
        (["--index", "foo"], "a number of --list is wanted, or 'shared'"),
        (["--fresh"], "unrecognized arguments: --fresh"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, arguments, sentence):
    refused = sweep(tmp_path, *arguments)
    assert refused.returncode == 2
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not list(tmp_path.glob("tiny-sweep-*"))


@pytest.mark.slow
def test_a_sweep_ends_in_a_table_and_goes_on_where_it_was(tmp_path):
    first = sweep(tmp_path)
    assert first.returncode == 0, first.stderr
    result = json.loads((tmp_path / "tiny-sweep" / "result.json").read_text())
    rows = result["rows"]
    assert {"commit", "versions", "hardware"} <= result.keys()
    assert [row["values"] for row in rows] == [
        {"ppo.plan_cost": 0.0},
        {"ppo.plan_cost": 0.5},
    ]
    again = sweep(tmp_path)
    assert again.returncode == 0
    assert again.stderr.count("done before") == 1 + 1 + 2 * 2
    assert again.stdout == first.stdout
    resumed = sweep(tmp_path, "--index", "shared", "--resume", "ppo.gamma=0.9")
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("ppo.gamma was 0.99 until here and is now 0.9") == 2


@pytest.mark.slow
def test_an_agent_that_is_told_prices_has_a_row_for_each(tmp_path):
    told = ["plan.prices=[0, 0.5]", "sweep.axes=[]", "ppo.start=chance"]
    ran = sweep(tmp_path, *told)
    assert ran.returncode == 0, ran.stderr
    rows = json.loads((tmp_path / "tiny-sweep" / "result.json").read_text())["rows"]
    assert [row["values"] for row in rows] == [
        {"plan.prices": 0.0},
        {"plan.prices": 0.5},
    ]
    assert [len(row["collapse"]) for row in rows] == [1, 1]
