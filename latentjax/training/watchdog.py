"""When one of several processes dies or hangs, the others say which one and end, so that a scheduler can start again.

Every process writes now and then where it is (step, and what it is about to do) onto a board that all can read, and
looks at what the others wrote. Who has stopped writing is lost. Who has not moved for long hangs, and the one that is
behind the others is the one they wait for. All of this happens beside the loop, which only says where it is.
"""

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from latentjax.training.last_words import TRAIN, Verb, Witness

# sysexits.h: a failure that may be gone the next time. Schedulers are told to start such a run again.
TRY_AGAIN = 75

# What the loop does in a step, in its order; where processes are at the same step, the one that is earlier is behind.
DOINGS = ("reading its batch", "running the step", "waiting for the step", "evaluating", "sampling", "saving")
_GRACE_TICKS = 2  # one that others name as gone may be about to say the same itself


class Board(Protocol):
    """Where every process writes a text that all can read."""

    def write(self, process: int, text: str) -> None:
        """Replaces the text of a process; may block or raise when the board's keeper is gone."""

    def read(self) -> dict[int, str]:
        """Returns the text of every process that has written; may block or raise likewise."""
        ...


class CoordinatorBoard:
    """The key-value store of the service that process 0 keeps for jax, to which every process is connected.

    Attributes:
      address: HOST:PORT of that service.
      process, num_processes: which this is, and how many there are; known without asking the devices.
    """

    _FOLDER = "latentjax/watchdog"

    def __init__(self) -> None:
        from jax._src import distributed  # nothing public gives the client; libraries for checkpoints take it so too

        state = distributed.global_state
        assert state.client is not None and state.coordinator_address is not None  # set as jax.distributed starts
        self._client, self.address = state.client, state.coordinator_address
        self.process, self.num_processes = state.process_id, state.num_processes

    def write(self, process: int, text: str) -> None:
        """See `Board`."""
        self._client.key_value_set(f"{self._FOLDER}/{process}", text, allow_overwrite=True)

    def read(self) -> dict[int, str]:
        """See `Board`."""
        return {int(key.rsplit("/", 1)[1]): text for key, text in self._client.key_value_dir_get(self._FOLDER)}


@dataclasses.dataclass
class Note:
    """What a process writes onto the board.

    Attributes:
      beat: counts how often it has written.
      host: of the process, with its process id.
      step, doing: where it is; `doing` is an index of DOINGS, or -1 before the first step, where nothing is timed.
      ended: None, or how it ended; "" if nothing was wrong.
      status: its exit status, once it has ended.
    """

    beat: int
    host: str
    step: int
    doing: int
    ended: str | None = None
    status: int = 0

    def place(self, verb: Verb) -> str:
        """Where it is, in words."""
        return verb.start if self.doing < 0 else f"{DOINGS[self.doing]} (step {self.step})"


@dataclasses.dataclass
class _Seen:
    """The last note of a process, and for how many ticks it has stayed the same."""

    note: Note
    ticks: int = 0


class Watchdog:
    """Watches over all processes of a run, in each of them. Thread-safe where the loop uses it."""

    def __init__(
        self,
        board: Board,
        process: int,
        num_processes: int,
        *,
        lost_after: float,
        hung_after: float,
        leave: Callable[[int], None] = os._exit,
        witness: Witness | None = None,
        verb: Verb = TRAIN,
    ):
        """Begins to watch.

        Args:
          lost_after: seconds without a sign of a process after which it counts as gone.
          hung_after: seconds without progress of this process's loop after which all end; 0: never.
          leave: ends this process with an exit status, whatever its other threads do.
          witness: is kept up to date about what to say should this process end without a word.
          verb: what the processes do together.
        """
        self._board, self._process, self._num_processes = board, process, num_processes
        self._tick_seconds = min(5.0, lost_after / 4)
        self._lost_ticks = max(2, round(lost_after / self._tick_seconds))
        self._hung_ticks = round(hung_after / self._tick_seconds)
        self._lost_after, self._hung_after = lost_after, hung_after
        self._leave, self._witness, self._verb = leave, witness, verb
        self._own = Note(0, f"{socket.gethostname()}, process id {os.getpid()}", 0, -1)
        # One that is never heard of is lost as well.
        self._seen = {each: _Seen(Note(0, "host not known", 0, -1)) for each in range(num_processes)}
        self._ticks_without_board = self._ticks_in_place = 0
        self._place = (0, -1)
        self._lock, self._over = threading.Lock(), threading.Event()
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True).start()

    def at(self, step: int, doing: str) -> None:
        """Tells where the loop is: about to do one of DOINGS for a step."""
        self._own.step, self._own.doing = step, DOINGS.index(doing)

    def end(self, reason: str, status: int) -> None:
        """Tells the others that this process ends: well if `reason` is empty, or else why. It is not watched any more.

        Process 0 keeps the board, and whoever is still connected when it goes is ended by jax in the middle of a word:
        after a failure it waits for the others, `lost_after` seconds at most.
        """
        self._over.set()
        if self._witness is not None:
            self._witness.dismiss()
        self._own.ended, self._own.status = reason, status
        # In a thread: where the board is gone, its client may wait for an answer for minutes.
        farewell = threading.Thread(target=self._say_farewell, name="watchdog_farewell", daemon=True)
        farewell.start()
        farewell.join(self._lost_after)

    def _say_farewell(self) -> None:
        reason = self._own.ended
        try:
            self._write()
            deadline = time.monotonic() + self._lost_after
            while reason and self._process == 0 and time.monotonic() < deadline:
                notes = {process: Note(**json.loads(text)) for process, text in self._board.read().items()}
                still = [note for process, note in notes.items() if note.ended is None and process not in self._gone()]
                if len(notes) == self._num_processes and not still:
                    break
                time.sleep(min(0.2, self._tick_seconds))
        except Exception:  # the board is gone, and so is whoever would read it
            pass

    def expect_verdict(self) -> None:
        """Waits until another process must have been found lost, if one is; then this process has ended here.

        For an error that says only that the devices of some other process do not answer.
        """
        self._over.wait((self._lost_ticks + _GRACE_TICKS + 1) * self._tick_seconds)

    def _exchange(self) -> None:
        """Writes and reads, until the end. May be held up for minutes when process 0 does not answer."""
        while not self._over.is_set():
            try:
                self._write()
                notes = {process: Note(**json.loads(text)) for process, text in self._board.read().items()}
            except Exception:  # counted by `_watch`, which names process 0
                notes = None
            if notes is not None:
                with self._lock:
                    self._ticks_without_board = 0
                    for process, note in notes.items():
                        if process not in self._seen or self._seen[process].note != note:
                            self._seen[process] = _Seen(note)
            self._over.wait(self._tick_seconds)

    def _write(self) -> None:
        self._own.beat += 1
        self._board.write(self._process, json.dumps(dataclasses.asdict(self._own)))

    def _watch(self) -> None:
        # Ticks and not the time: while this process is stopped, none goes by, and nobody is found lost for that.
        while not self._over.wait(self._tick_seconds):
            if self._witness is not None:
                self._witness.update(self._own.place(self._verb))
            verdict = self.tick()
            if verdict is not None and not self._over.is_set():
                reason, status = verdict
                print(f"latentjax.{self._verb.name}: process {self._process}: {reason}", file=sys.stderr, flush=True)
                self.end(reason, status)
                self._leave(status)
                return

    def tick(self) -> tuple[str, int] | None:
        """Counts a tick; returns why this process has to end, and with which status, or None."""
        with self._lock:
            self._ticks_without_board += 1
            for seen in self._seen.values():
                seen.ticks += 1
            if self._ticks_without_board > self._lost_ticks:
                place = f" at {address}" if (address := getattr(self._board, "address", None)) else ""
                return self._lost(f"process 0{place}, which connects the processes, has not answered"), TRY_AGAIN
            for process, seen in sorted(self._seen.items()):
                if process == self._process or seen.note.ended == "":
                    continue
                if seen.note.ended is not None:
                    if seen.ticks > _GRACE_TICKS:
                        return f"process {process} ({seen.note.host}) has ended: {seen.note.ended}", seen.note.status
                elif process in self._gone():
                    last = f"when last heard of, it was {seen.note.place(self._verb)}"
                    return self._lost(f"nothing was heard of process {process} ({seen.note.host})", last), TRY_AGAIN
            return self._hang()

    def _gone(self) -> list[int]:
        return [process for process, seen in self._seen.items() if seen.ticks > self._lost_ticks]

    def _lost(self, what: str, more: str = "") -> str:
        return f"{what} for {self._lost_after:g} s{'; ' if more else ''}{more}; leaving, {self._verb.again}"

    def _hang(self) -> tuple[str, int] | None:
        place = (self._own.step, self._own.doing)
        self._ticks_in_place = self._ticks_in_place + 1 if place == self._place else 0
        self._place = place
        if not self._hung_after or place[1] < 0 or self._ticks_in_place <= self._hung_ticks:
            return None
        places = {process: (seen.note.step, seen.note.doing) for process, seen in self._seen.items()}
        places[self._process] = place
        behind = sorted(process for process in places if places[process] == min(places.values()))
        if len(behind) == len(places):
            culprit = f"all are {self._own.place(self._verb)}, so their devices wait for each other"
        else:
            hosts = {process: seen.note for process, seen in self._seen.items()} | {self._process: self._own}
            names = ", ".join(f"process {process} ({hosts[process].host})" for process in behind)
            culprit = f"the one behind is {names}, {hosts[behind[0]].place(self._verb)}"
        return f"no progress for {self._hung_after:g} s: {culprit}; leaving, {self._verb.again}", TRY_AGAIN
