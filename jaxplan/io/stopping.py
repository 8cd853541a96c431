"""A polite stop: the first SIGTERM or SIGINT asks, and the run saves before it ends."""

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = 75  # "temporary failure, try again": the same command resumes


class Stopped(Exception):  # noqa: N818 (no error: someone asked for it)
    """The run was asked to stop, and has saved what it had."""


class StopRequest:
    """Remembers that someone asked the process to stop; poll ``requested``.

    A second signal is not caught: it ends the process at once.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self.requested = False

    def listen(self) -> "StopRequest":
        """Catch SIGTERM and SIGINT from now on."""
        for number in _SIGNALS:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)
