"""Being asked to stop: by SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (schedulers), SIGHUP (a terminal that closes), and by
the platform's notice of preemption.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

# SIGUSR1 is what Slurm users commonly choose for the warning before the time limit (sbatch --signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """A context in which the first of SIGNALS asks for a stop and the second one stops at once.

    The second needs no help from Python: the first puts the system's own handling back, so that even a long
    compilation or a hanging disk gives way.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: it was not set by Python, which cannot put it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        print(f"\n{self.signal.name}: saving and leaving after this step; again to leave at once", file=sys.stderr)

    def notice(self, reason: str) -> None:
        """Takes note that the platform will end this process soon, which is as if it had sent SIGTERM. Thread-safe."""
        if self.signal is None:
            self.signal = signal.SIGTERM
            print(f"\n{reason}: saving and leaving after this step", file=sys.stderr, flush=True)

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


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """A context in which SIGINT ends the process as SIGTERM does: at once, and not when threads are done with theirs.

    For work that cannot be interrupted and loses nothing, such as compilation.
    """
    previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
