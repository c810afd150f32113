"""Writing for TensorBoard, in the thread that asks for it.

tensorboardX's own writer hands everything to a thread. When that one dies, of a full disk say, the queue to it fills up
and the run waits forever.
"""

import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

_FLUSH_SECONDS = 10.0


class TensorBoardLog:
    """An event file. All methods raise `OSError` where it cannot be written."""

    def __init__(self, directory: Path, first_step: int):
        """Begins a file; what older ones in the directory say of `first_step` and later is not shown any more."""
        directory.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"))
        self._flushed_at = time.monotonic()
        self._write(Event(step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a point to a curve."""
        self._write(Event(step=step, summary=summary.scalar(name, value)))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Adds a text."""
        self._write(Event(step=step, summary=summary.text(name, text)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        now = time.monotonic()
        if now - self._flushed_at >= _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed_at = now

    def close(self) -> None:
        """Flushes and closes the file."""
        self._writer.close()
