"""scripts/compare.py on its smallest sizes."""

import json
import subprocess
import sys

import pytest

from tests.scripts.test_train import ENVIRONMENT, REPOSITORY

CONFIG = "configs/experiments/estimators/config.yaml"
SMALL = ["rollout.num_lanes=4", "ppo.iterations=2", "sweep.seeds=2", "plan.budget=1"]


def compare(root, *arguments, **environment):
    script = str(REPOSITORY / "scripts" / "compare.py")
    command = [sys.executable, script, "--config", CONFIG, f"run_root={root}", *SMALL]
    return subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["sweep.axes=[]"], 2, "sweep.axes: empty"),
        (["sweep.axes=[[ppo.plan_cots, [1]]]"], 2, "'plan_cost'?"),
        (["model.lora.rank=2"], 2, "train alone"),
    ],
)
def test_mistakes_are_told(tmp_path, arguments, code, sentence):
    refused = compare(tmp_path, *arguments)
    assert refused.returncode == code
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_jax_that_does_not_start_is_told_in_one_line(tmp_path):
    refused = compare(tmp_path, JAX_PLATFORMS="abacus")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "error: Unable to initialize backend 'abacus'" in refused.stderr


@pytest.mark.slow
def test_points_that_differ_in_price_alone_are_one_population(tmp_path):
    done = compare(tmp_path, "sweep.axes=[[ppo.plan_cost, [0, 0.5]]]")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("== plan_cost=0 plan_cost=0.5") == 1
    rows = json.loads((tmp_path / "estimators" / "result.json").read_text())["rows"]
    assert [row["values"]["ppo.plan_cost"] for row in rows] == [0, 0.5]
    by_seed = [row["return"]["whole"]["by_seed"] for row in rows]
    assert len(by_seed[0]) == 2
    # The first iterations are value-only: the price has not changed the play yet.
    assert by_seed[0] == by_seed[1]
    assert done.stdout.startswith("| ppo.plan_cost | return, whole run |")
