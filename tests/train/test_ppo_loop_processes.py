"""Two processes with four devices each, on this machine, against one with eight."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxplan.core.mesh import to_host
from jaxplan.io.checkpoints import latest_step
from jaxplan.io.metrics import read_metrics, without_timing
from jaxplan.io.stopping import EXIT_CODE
from jaxplan.train.setting import load_policy
from tests.processes import finish, start_two
from tests.train.worker import make_setting, run_stages

SHAPE, OTHER_SHAPE = (2, 2, 2), (1, 4, 1)


def start(run_dir: Path, epochs: int) -> list[subprocess.Popen]:
    """Start both processes of a run, with four devices each."""
    arguments = [str(run_dir), *map(str, SHAPE), str(epochs)]
    return start_two([sys.executable, "-m", "tests.train.worker", *arguments], 4)


def losses(run_dir: Path) -> list[dict]:
    return [without_timing(row) for row in read_metrics(run_dir)]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_and_leave_one_checkpoint(tmp_path):
    first, second = finish(start(tmp_path / "two", epochs=1), 0)
    assert "ppo  2/2" in first
    assert "ppo" not in second
    assert (tmp_path / "two" / "lock.json").read_text() == "", "given back"
    alone = make_setting(tmp_path / "one", SHAPE)
    run_stages(alone)
    rows, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    places = [(row["stage"], row["step"]) for row in rows]
    assert places == [(row["stage"], row["step"]) for row in expected]
    assert ("sft", 1) in places
    assert places[-2:] == [("ppo", 0), ("ppo", 1)]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"stage"}:
            np.testing.assert_allclose(
                row[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name
            )
    elsewhere = make_setting(tmp_path / "two", OTHER_SHAPE)
    for stage in ("sft", "ppo"):
        restored = load_policy(elsewhere, stage)
        assert restored.llama.embed.sharding.mesh == elsewhere.mesh
        learnt = to_host(load_policy(alone, stage))
        for a, b in zip(
            jax.tree.leaves(to_host(restored)), jax.tree.leaves(learnt), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_update(tmp_path):
    processes = start(tmp_path / "two", epochs=10**5)
    while len(read_metrics(tmp_path / "two")) < 3:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[1].send_signal(signal.SIGTERM)
    finish(processes, EXIT_CODE)
    rows = read_metrics(tmp_path / "two")
    assert rows[-1]["step"] == latest_step(tmp_path / "two" / "checkpoints/sft") - 1
