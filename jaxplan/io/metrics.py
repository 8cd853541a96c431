"""One writer for the numbers of a run: ``metrics.jsonl`` and TensorBoard event files.

The JSONL file is the source of truth: one object a line, ``{"stage", "step", "time",
"group/name": value, ...}``. The event files show the same to TensorBoard, a folder a
stage. After a crash both are cut back to the step the stage resumes from, so that no
step is in them twice.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, SupportsFloat

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from jaxplan.core.processes import is_first

Row = dict[str, Any]

# The classes of generated modules are made at import; a type checker sees none.
_event_pb2: Any = event_pb2
_summary_pb2: Any = summary_pb2
_tensor_pb2: Any = tensor_pb2
_types_pb2: Any = types_pb2

_BOOKKEEPING = ("stage", "step", "time")
_TIMED_GROUPS = ("time/", "memory/")


class MetricsWriter:
    """Writes the metrics of one stage; rows are on disk when a call returns.

    Of several processes only the first one writes.

    Args:
        run_dir: the run directory; ``metrics.jsonl`` and ``tensorboard/<stage>`` are
            made in it.
        stage: name of the stage that writes.
    """

    def __init__(self, run_dir: Path | str, stage: str):
        self.stage = stage
        self._silent = not is_first()
        if self._silent:
            return
        self._jsonl = Path(run_dir) / "metrics.jsonl"
        self._event_dir = Path(run_dir) / "tensorboard" / stage
        self._event_dir.mkdir(parents=True, exist_ok=True)
        rows = [row for row in read_metrics(run_dir) if row["stage"] == stage]
        self._last_step = max((row["step"] for row in rows), default=-1)
        self._events: RecordWriter | None = None
        _drop_torn_line(self._jsonl)
        self._lines = self._jsonl.open("a", encoding="utf-8")

    def resume_from(self, step: int) -> None:
        """Forget what this stage wrote at ``step`` and later; 0 starts it afresh.

        Other stages' rows stay. TensorBoard drops the same steps when it meets the
        session start in the new event file.
        """
        if self._silent:
            return
        self._lines.close()
        _rewrite(
            self._jsonl,
            lambda row: row["stage"] != self.stage or row["step"] < step,
        )
        self._lines = self._jsonl.open("a", encoding="utf-8")
        self._last_step = step - 1
        self._open_events(step)

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Write one row.

        Args:
            step: the stage's own counter; never below that of an earlier row.
            values: named ``group/name``. JSON knows no NaN and no infinity: such a
                value becomes null in the JSONL and stays itself in the event file.

        Raises:
            ValueError: a step that goes backwards, or a name without a group.
        """
        if self._silent:
            return
        self._check(step, values)
        now = time.time()
        numbers = {name: float(value) for name, value in values.items()}
        row: Row = {"stage": self.stage, "step": step, "time": now}
        row |= {n: v if math.isfinite(v) else None for n, v in numbers.items()}
        self._lines.write(json.dumps(row, allow_nan=False) + "\n")
        self._lines.flush()
        summary = _summary_pb2.Summary()
        for name, value in numbers.items():
            summary.value.add(tag=name, simple_value=value)
        self._write_event(wall_time=now, step=step, summary=summary)
        self._last_step = step

    def text(self, tag: str, text: str, step: int) -> None:
        """Show Markdown ``text`` in TensorBoard's text tab; not part of the JSONL."""
        if self._silent:
            return
        metadata = _summary_pb2.SummaryMetadata()
        metadata.plugin_data.plugin_name = "text"
        tensor = _tensor_pb2.TensorProto(
            dtype=_types_pb2.DT_STRING, string_val=[text.encode("utf-8")]
        )
        summary = _summary_pb2.Summary()
        summary.value.add(tag=tag, metadata=metadata, tensor=tensor)
        self._write_event(wall_time=time.time(), step=step, summary=summary)

    def close(self) -> None:
        """Close both files; further writes are errors."""
        if self._silent:
            return
        self._lines.close()
        if self._events is not None:
            self._events.close()

    def _check(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        if step < self._last_step:
            raise ValueError(
                f"metrics of {self.stage}: step {step} after step {self._last_step}; "
                f"call resume_from({step}) to write these steps again"
            )
        for name in values:
            if "/" not in name:
                raise ValueError(
                    f"metrics of {self.stage}: {name!r} has no group; "
                    "a name looks like 'env/return'"
                )

    def _write_event(self, **fields: Any) -> None:
        events = self._events or self._open_events(self._last_step + 1)
        events.write(_event_pb2.Event(**fields).SerializeToString())
        events.flush()

    def _open_events(self, step: int) -> RecordWriter:
        """Begin the next event file, in which ``step`` and later are written anew.

        TensorBoard reads the files of a folder in the order of their names, hence
        the number; with the library's own names, which begin with the second they
        were made in, a quick restart could sort before what it replaces. It writes
        from a thread as well, and a killed run would lose what is in the queue.
        """
        if self._events is not None:
            self._events.close()
        number = len(list(self._event_dir.glob("events.out.tfevents.*")))
        path = self._event_dir / f"events.out.tfevents.{number:06d}"
        self._events = RecordWriter(path.open("wb"))
        now = time.time()
        start = _event_pb2.SessionLog(status=_event_pb2.SessionLog.START)
        self._write_event(wall_time=now, file_version="brain.Event:2")
        self._write_event(wall_time=now, step=step, session_log=start)
        return self._events


def read_metrics(run_dir: Path | str) -> list[Row]:
    """Read all whole rows of a run, in the order they were written; [] without any."""
    path = Path(run_dir) / "metrics.jsonl"
    return list(_rows(path)) if path.exists() else []


def without_timing(row: Row) -> Row:
    """Keep of a row what two runs of one seed have in common.

    Dropped are the clock (``time``), the groups ``time/*`` and ``memory/*``, and the
    rates that end in ``_per_second``.
    """
    return {
        name: value
        for name, value in row.items()
        if name != "time"
        and not name.startswith(_TIMED_GROUPS)
        and not name.endswith("_per_second")
    }


def metric_names(row: Row) -> list[str]:
    """Name the metrics in a row, that is, all but stage, step and time."""
    return [name for name in row if name not in _BOOKKEEPING]


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # else the writer was killed in the middle of it
                yield json.loads(line)


def _rewrite(path: Path, keep: Callable[[Row], bool]) -> None:
    """Replace a JSONL file, in one step, by those of its rows that ``keep`` accepts."""
    rows = [row for row in _rows(path) if keep(row)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    os.replace(temporary, path)


def _drop_torn_line(path: Path) -> None:
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        _rewrite(path, keep=lambda row: True)
