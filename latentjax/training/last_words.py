"""What is said for a process that ends without a word: killed, out of memory, or ended by jax when process 0 is gone.

A process of a few megabytes stands beside each of several that work together. It reads from a pipe where the other one
is; when the pipe ends before the other one has taken its leave, it says so.

python -m latentjax.training.last_words PROCESS COORDINATOR VERB
"""

import contextlib
import dataclasses
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable

_GOODBYE = "goodbye"


@dataclasses.dataclass(frozen=True)
class Verb:
    """How it is spoken of what several processes do together.

    Attributes:
      name: of the verb.
      start: what a process does that has not said where it is.
      again: what is to be done when one of them is gone.
    """

    name: str
    start: str
    again: str


TRAIN = Verb("train", "before its first step", "the same command continues")
EVALUATE = Verb("evaluate", "evaluating", "give the same command again")
_VERBS = {verb.name: verb for verb in (TRAIN, EVALUATE)}


class Witness:
    """The process that speaks when this one cannot."""

    def __init__(self, process: int, coordinator: str, verb: Verb):
        """Starts it; `coordinator` is HOST:PORT of process 0."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "latentjax.training.last_words", str(process), coordinator, verb.name],
            stdin=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None  # a pipe
        self._pipe = self._process.stdin

    def update(self, place: str) -> None:
        """Tells where this process is."""
        self._say(place)

    def dismiss(self) -> None:
        """Takes leave: whatever there is to be said, this process says itself."""
        self._say(_GOODBYE)
        with contextlib.suppress(OSError):
            self._pipe.close()

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has died before us, and nobody minds
            self._pipe.write(f"{line}\n")
            self._pipe.flush()


def last_words(lines: Iterable[str], process: str, coordinator: str, verb: Verb) -> str | None:
    """Reads what the process says until it ends; returns what is to be said for it, or None if it took its leave."""
    place = verb.start
    for line in lines:
        if line.strip() == _GOODBYE:
            return None
        place = line.strip()
    host, _, port = coordinator.rpartition(":")
    cause = "killed, or ended by its runtime"
    if process != "0":
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            cause = f"process 0 at {coordinator}, which connects the processes, is gone"
    return f"process {process} ended while {place}: {cause}; {verb.again}"


def main() -> None:
    """Stands beside the process that is at the other end of stdin."""
    # They go to the whole group, and the other one has work to do yet.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    process, coordinator, name = sys.argv[1:]
    words = last_words(sys.stdin, process, coordinator, _VERBS[name])
    if words is not None:
        print(f"latentjax.{name}: {words}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
