"""Runs of an experiment, one after the other or several side by side.

Small models leave much of a machine idle: two runs with one core each end sooner than
one after the other with two. Each run is a program of its own; a signal that asks to
stop reaches all of them, they save what they have, and no other run is started.
"""

import os
import queue
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FrameType
from typing import Any

from jaxplan.io.stopping import EXIT_CODE

Job = tuple[str, Sequence[str]]  # name of a run, and its overrides


def run_jobs(command: Sequence[str], jobs: Sequence[Job], at_once: int = 1) -> int:
    """Run jobs until one fails or a signal asks to stop.

    Args:
        command: what runs one, but for its name and overrides.
        jobs: in the order in which they are started.
        at_once: how many side by side. If more than one, each has its share of the
            cores, and every line that it tells begins with its name.

    Returns:
        0, or the exit status of the first one that did not end with 0.
    """
    cores = _cores()
    at_once = max(1, min(at_once, len(jobs)))  # who is alone has all cores
    crew = _Crew(command, [cores[number::at_once] for number in range(at_once)])
    with crew.hears_signals(), ThreadPoolExecutor(at_once) as pool:
        statuses = list(pool.map(crew.work, jobs))
    return next((status for status in statuses if status), 0)


def jobs_at_once(text: str) -> int:
    """Read the number of a command line's ``--jobs``.

    Raises:
        ArgumentTypeError: no number, or one that leaves a job without a core.
    """
    cores = len(_cores())
    if not text.isdecimal() or not 1 <= int(text) <= cores:
        raise ArgumentTypeError(
            f"{text!r}: each job needs a core, so give a number from 1 to {cores}"
        )
    return int(text)


def _cores() -> list[int]:
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return [0]  # elsewhere a process cannot be held to some of them


def _tell(line: str) -> None:
    sys.stderr.write(line)  # whole lines, so that two jobs do not mix
    sys.stderr.flush()


class _Crew:
    """Workers that share cores, and stop together."""

    def __init__(self, command: Sequence[str], shares: Sequence[Sequence[int]]) -> None:
        self._command = command
        self._alone = len(shares) == 1
        self._shares: queue.SimpleQueue[Sequence[int]] = queue.SimpleQueue()
        for share in shares:
            self._shares.put(share)
        self._running: set[subprocess.Popen] = set()
        self._stop = False

    def work(self, job: Job) -> int:
        """Run one command and return its exit status; stopped, leave it for later."""
        if self._stop:
            return EXIT_CODE
        name, overrides = job
        _tell(f"== {name}\n")
        command = [*self._command, f"name={name}", *overrides]
        share, status = self._shares.get(), EXIT_CODE
        try:
            if self._alone:
                status = self._run(command)
            else:
                status = self._run_on(share, command, name)
        finally:  # whatever happened, nobody waits for this share for ever
            self._stop |= status != 0
            self._shares.put(share)
        return status

    def _run(self, command: Sequence[str]) -> int:
        with self._started(command) as process:
            return process.wait()

    def _run_on(self, cores: Sequence[int], command: Sequence[str], name: str) -> int:
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with self._started(command, errors="replace", **piped) as process:
            os.sched_setaffinity(process.pid, cores)  # before it counts them
            assert process.stdout is not None
            for line in process.stdout:
                _tell(f"{name}: {line}")
            return process.wait()

    @contextmanager
    def _started(
        self, command: Sequence[str], **options: Any
    ) -> Generator[subprocess.Popen]:
        """Start a process that no signal of a terminal reaches but through us."""
        with subprocess.Popen(command, process_group=0, **options) as process:
            self._running.add(process)
            if self._stop:  # since we looked
                process.terminate()
            try:
                yield process
            finally:
                self._running.discard(process)

    @contextmanager
    def hears_signals(self) -> Generator[None]:
        """Let the jobs end by themselves when this process is asked to stop."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._stop = True
        for process in tuple(self._running):
            process.send_signal(number)
