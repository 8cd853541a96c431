import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
ENV = REPOSITORY / "scripts" / "env"


def run(*command, **variables):
    return subprocess.run(
        [ENV, *command], env=os.environ | variables, capture_output=True, text=True
    )


def test_an_unknown_platform_is_refused_with_the_known_ones():
    finished = run("true", JAXPLAN_PLATFORM="gpu")
    assert finished.returncode == 2
    assert finished.stderr == (
        "scripts/env: JAXPLAN_PLATFORM=gpu; allowed: cpu, cuda12, cuda13, tpu\n"
    )


def test_a_missing_command_is_asked_for():
    finished = run()
    assert finished.returncode == 2
    assert "Usage: scripts/env COMMAND" in finished.stderr


@pytest.mark.skipif(
    Path(sys.prefix) != REPOSITORY / ".venv" or "JAXPLAN_PLATFORM" in os.environ,
    reason="not run through scripts/env, which would now install",
)
def test_a_finished_environment_is_entered_at_once():
    stamp = Path(sys.prefix) / "jaxplan-stamp"
    if not stamp.exists() or "unfinished" in stamp.read_text():
        pytest.skip("not run through scripts/env, which would now install")
    seconds = []
    for _ in range(5):  # other tests may run beside this one
        start = time.perf_counter()
        finished = run("sh", "-c", "echo $VIRTUAL_ENV; exit 3")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5
    assert (finished.stdout, finished.stderr) == (f"{sys.prefix}\n", "")
    assert finished.returncode == 3
