"""Being asked to stop: SIGINT (Ctrl-C) and SIGTERM (schedulers)."""

import signal
import sys
from types import FrameType, TracebackType


class StopRequest:
    """A context in which the first SIGINT or SIGTERM asks for a stop and the second one stops at once.

    The second needs no help from Python: the first puts the system's own handling back, so that even a long
    compilation or a hanging disk gives way.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        print(f"\n{self.signal.name}: saving and leaving after this step; again to leave at once", file=sys.stderr)

    def note_others(self) -> None:
        """Takes note that another process was asked to stop, and so all of them do."""
        self.signal = self.signal or signal.SIGTERM

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells and schedulers expect of a process that a signal ended."""
        return 128 + self.signal if self.signal else 0
