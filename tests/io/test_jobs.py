"""Jobs that are tiny programs: who runs when, on which cores, and how they stop."""

import os
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from jaxplan.io.jobs import jobs_at_once, run_jobs
from jaxplan.io.stopping import EXIT_CODE

CORES = sorted(os.sched_getaffinity(0))
TELL = """
import os, sys, time
name, folder, status, *_ = [text.partition("=")[2] for text in sys.argv[1:]]
began = time.monotonic()
time.sleep(0.5)
print("hello from", name)
with open(os.path.join(folder, name), "w") as file:
    print(began, time.monotonic(), *os.sched_getaffinity(0), file=file)
sys.exit(int(status))
"""
# Saves when it is asked to stop; the jobs' parent is told to stop by a signal.
SAVE = """
import pathlib, signal, sys, time
name, folder = [text.partition("=")[2] for text in sys.argv[1:]]
def save(*_):
    pathlib.Path(folder, name + "-saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
pathlib.Path(folder, name).touch()
time.sleep(60)
"""
PARENT = """
import sys
from jaxplan.io.jobs import run_jobs
folder, at_once, code = sys.argv[1:]
jobs = [(name, [f"folder={folder}"]) for name in "abc"]
sys.exit(run_jobs([sys.executable, "-c", code], jobs, int(at_once)))
"""


def tell(folder: Path, *statuses: int):
    """Jobs a, b, c… that end with these statuses."""
    return [
        ("abcdef"[number], [f"folder={folder}", f"status={status}"])
        for number, status in enumerate(statuses)
    ]


def test_jobs_run_in_order_on_all_cores(tmp_path):
    assert run_jobs([sys.executable, "-c", TELL], tell(tmp_path, 0, 0)) == 0
    (_, end, *cores), (begin, *_) = (
        [float(word) for word in (tmp_path / name).read_text().split()] for name in "ab"
    )
    assert end < begin
    assert cores == CORES


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_jobs_side_by_side_share_the_cores_and_are_told_apart(tmp_path, capfd):
    assert run_jobs([sys.executable, "-c", TELL], tell(tmp_path, 0, 0, 0), 2) == 0
    told = {
        name: [float(word) for word in (tmp_path / name).read_text().split()]
        for name in "abc"
    }
    assert told["b"][0] < told["a"][1], "at the same time"
    assert sorted(told["a"][2:] + told["b"][2:]) == CORES
    captured = capfd.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert {f"{name}: hello from {name}" for name in "abc"} <= set(lines)


@pytest.mark.skipif(len(CORES) < 2, reason="needs two cores")
def test_a_job_that_is_alone_has_all_cores(tmp_path):
    assert run_jobs([sys.executable, "-c", TELL], tell(tmp_path, 0), 2) == 0
    assert [int(word) for word in (tmp_path / "a").read_text().split()[2:]] == CORES


def test_nothing_is_started_after_a_failure(tmp_path):
    assert run_jobs([sys.executable, "-c", TELL], tell(tmp_path, 0, 3, 0)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("at_once", [1, min(2, len(CORES))])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_running_jobs_save_and_starts_no_other(
    tmp_path, at_once, number
):
    arguments = [str(tmp_path), str(at_once), SAVE]
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, *arguments],
        cwd=Path(__file__).resolve().parents[2],
        start_new_session=True,
    )
    while len(list(tmp_path.iterdir())) < at_once:
        assert parent.poll() is None
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(parent.pid, number)  # as a terminal does
    else:
        parent.send_signal(number)
    assert parent.wait(timeout=30) == EXIT_CODE
    expected = [f"{name}{end}" for name in "ab"[:at_once] for end in ("", "-saved")]
    assert sorted(path.name for path in tmp_path.iterdir()) == expected


def test_more_jobs_than_cores_are_refused():
    assert jobs_at_once("1") == 1
    for text in ("0", "-1", "two", str(len(CORES) + 1)):
        with pytest.raises(ArgumentTypeError, match=f"1 to {len(CORES)}"):
            jobs_at_once(text)
