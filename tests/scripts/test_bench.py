"""The benchmark on its smallest sizes, as a user runs it."""

import json
import subprocess
import sys

import pytest

from tests.scripts.test_train import ENVIRONMENT, REPOSITORY, TINY


def bench(*arguments, **environment):
    script = str(REPOSITORY / "scripts" / "bench.py")
    return subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | environment,
        check=False,
    )


@pytest.mark.slow
def test_speed_and_precision_are_told():
    done = bench("--config", str(TINY), "--repeats", "2", "env.name=probe")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["first_seconds"] > told["rollout_seconds"] + told["update_seconds"]
    assert told["update_tokens_per_second"] == pytest.approx(
        8 * 256 / told["update_seconds"]
    )
    assert 0 < told["utilisation"] <= 1
    exact, coarse = (told["log_prob_error"][t] for t in ("float32", "bfloat16"))
    assert list(exact.values()) == sorted(exact.values())
    assert exact["q1"] < 1e-5
    assert exact["q1"] < coarse["q0.99"] < 0.1


def test_a_bad_repeat_and_a_bad_key_are_refused_at_once(tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text("name: x\nmodle: {}\n")
    done = bench("--config", str(config))
    assert done.returncode == 2
    assert "did you mean 'model'" in done.stderr
    done = bench("--config", str(config), "--repeats", "0")
    assert done.returncode == 2
    assert "--repeats 0" in done.stderr


def test_a_jax_that_does_not_start_is_told_in_one_line():
    refused = bench("--config", str(TINY), JAX_PLATFORMS="abacus")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr
    assert "error: Unable to initialize backend 'abacus'" in refused.stderr
