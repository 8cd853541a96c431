"""A polite stop: the first SIGTERM or SIGINT asks, and the run saves before it ends.

Of several processes one is enough: all of them stop at the same place.
"""

import signal
import time
from types import FrameType

from jaxplan.core.processes import any_process

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Seconds in which a signal is the first one told again: a batch system tells every
# process of a job, and so does whoever started them.
_ECHO = 1.0
EXIT_CODE = 75  # "temporary failure, try again": the same command resumes


class Stopped(Exception):  # noqa: N818 (no error: someone asked for it)
    """The run was asked to stop, and has saved what it had."""


class StopRequest:
    """Remembers that someone asked the process to stop; poll ``requested``.

    A signal more than a second later is not caught: it ends the process. Listen after
    ``start_processes``, or JAX swallows the signals that are to stop a run.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False
        self._since = 0.0

    @property
    def requested(self) -> bool:
        """Tell whether anyone asked in any process; all of these must poll alike."""
        return any_process(self._asked)

    def listen(self) -> "StopRequest":
        """Catch SIGTERM and SIGINT from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if not self._asked:
            self._asked, self._since = True, now
        elif now - self._since > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
