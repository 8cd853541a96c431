"""Signals ask politely once; the second one ends the process."""

import signal
import subprocess
import sys

import pytest

from jaxplan.io.stopping import StopRequest


@pytest.fixture
def handlers():
    """Put back whoever listened before."""
    before = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)
    }
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_has_asked_at_first():
    assert not StopRequest().requested


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    stop = StopRequest().listen()
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("SIGTERM", "SIGTERM"),
        ("SIGINT", "SIGINT"),
        ("SIGTERM", "SIGINT"),
        ("SIGINT", "SIGTERM"),
    ],
)
def test_a_later_signal_ends_the_process(first, second):
    program = (
        "import signal\n"
        "from jaxplan.io import stopping\n"
        "from jaxplan.io.stopping import StopRequest\n"
        "stopping._ECHO = 0.0\n"
        "stop = StopRequest().listen()\n"
        f"signal.raise_signal(signal.{first})\n"
        "print(stop.requested, flush=True)\n"
        f"signal.raise_signal(signal.{second})\n"
        "print('still alive')\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True
    )
    assert finished.stdout == "True\n"
    assert finished.returncode == -getattr(signal, second)


@pytest.mark.usefixtures("handlers")
def test_a_signal_told_twice_is_one():
    stop = StopRequest().listen()
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested
