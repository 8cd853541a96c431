"""A polite stop: the first SIGTERM or SIGINT asks, and the run saves before it ends.

Of several processes one is enough: all of them stop at the same place.
"""

import signal
from types import FrameType

from jaxplan.core.processes import any_process

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 75  # "temporary failure, try again": the same command resumes


class Stopped(Exception):  # noqa: N818 (no error: someone asked for it)
    """The run was asked to stop, and has saved what it had."""


class StopRequest:
    """Remembers that someone asked the process to stop; poll ``requested``.

    A second signal is not caught: it ends the process at once. Listen after
    ``start_processes``, or JAX swallows the signals that are to stop a run.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False

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
        del number, frame
        self._asked = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
