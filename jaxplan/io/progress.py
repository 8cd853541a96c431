"""The progress line of a stage: live on a terminal, a line now and then elsewhere.

It shows what it is handed and never fetches a value by itself.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as LiveDisplay

from jaxplan.core.processes import is_first


class Progress:
    """Shows how far a stage is; silent in all processes but the first.

    Args:
        stage: its name.
        total: steps until it is done.
        done: steps that were done before this process began, after a resume.
        interval: seconds between two lines where there is no terminal.
        stream: where to, standard error by default.
        clock: seconds, for the tests.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        done: int = 0,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stage = stage
        self._total = total
        self._first = done
        self._interval = interval
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = clock()
        self._last_line = -math.inf
        self._silent = not is_first()
        self._live: LiveDisplay | None = None
        self._task = TaskID(0)
        if not self._silent and self._stream.isatty():
            self._begin_live()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, step: int, **shown: float | int) -> None:
        """Show that ``step`` steps are done, beside named values.

        Args:
            step: steps done so far, of the total.
            shown: for example ``loss=0.7, env_steps_per_second=512.0``; a name that
                ends in ``_rate`` or ``_share`` is shown in percent.
        """
        if self._silent:
            return
        values = "  ".join(_format(name, value) for name, value in shown.items())
        if self._live is not None:
            self._live.update(self._task, completed=step, values=values)
        else:
            self._print_now_and_then(step, values)

    def tell(self, text: str) -> None:
        """Write a line that stays, such as a warning."""
        if self._silent:
            return
        line = f"{self._stage}  {text}"
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
            return
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def _begin_live(self) -> None:
        self._live = LiveDisplay(
            TextColumn("[bold]{task.description:<8}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", style="cyan"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
        )
        self._task = self._live.add_task(
            self._stage, total=self._total, completed=self._first, values=""
        )
        self._live.start()

    def _print_now_and_then(self, step: int, values: str) -> None:
        now = self._clock()
        if step < self._total and now - self._last_line < self._interval:
            return
        self._last_line = now
        parts = [f"{self._stage}  {step}/{self._total}", values, self._time(step, now)]
        self._stream.write("  ".join(filter(None, parts)) + "\n")
        self._stream.flush()

    def _time(self, step: int, now: float) -> str:
        elapsed = now - self._start
        if step >= self._total:
            return f"done in {_duration(elapsed)}"
        if step <= self._first:
            return ""
        left = elapsed / (step - self._first) * (self._total - step)
        return f"{_duration(left)} left"


def _format(name: str, value: float | int) -> str:
    """Write ``plan rate 12.5%``, ``env steps/s 1,204``, ``loss 0.731``."""
    words = name.removesuffix("_per_second").replace("_", " ")
    if name.endswith("_per_second"):
        words += "/s"
    if name.endswith(("_rate", "_share")):
        return f"{words} {value:.1%}"
    if isinstance(value, int) or abs(value) >= 100:
        return f"{words} {value:,.0f}"
    return f"{words} {value:.3g}"


def _duration(seconds: float) -> str:
    """Write ``42 s``, ``3 min 05 s``, ``2 h 10 min``."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    if minutes == 0:
        return f"{whole} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
