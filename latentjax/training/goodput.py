"""Where the wall time of a run goes, over all its starts: the share of it in steps that counted, and the rest.

Time is booked to parts one after another, so that they add up to the whole. A checkpoint keeps the account as it was;
the file goodput.json in the run's directory keeps it as it is, every few seconds, so that the time of a start which was
killed is known up to then. Time in steps that are behind the checkpoint where the next start begins is theirs no more:
they are done again.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from latentjax.training.run_directory import write_whole

GOODPUT_FILE = "goodput.json"
STEPS = "steps"
# In the order in which they are shown. `redone`: steps since the last checkpoint when the run was killed. `rewound`:
# steps taken back because of bad numbers, and the going back.
PARTS = (STEPS, "start", "compile", "evaluation", "saving", "sampling", "redone", "rewound")

_SECONDS_BETWEEN_WRITES = 5.0


class Goodput:
    """The account of a run's wall time, in seconds."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time):
        """Begins with a start of the run, now.

        Args:
          monotonic, now: clocks in seconds; only the second means the same to other processes and starts.
        """
        self._monotonic, self._now = monotonic, now
        self._last, self._written = monotonic(), -float("inf")
        self._began = now()
        self._seconds: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.downtime = 0.0  # between starts
        self.starts = 1

    def book(self, part: str) -> None:
        """Books the time since the last booking to one of PARTS."""
        now = self._monotonic()
        self._seconds[part] += now - self._last
        self._last = now

    @contextlib.contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Books the time before to steps, and that within to `part`."""
        self.book(STEPS)
        try:
            yield
        finally:
            self.book(part)

    def take_up(self, workdir: Path, checkpoint: dict[str, Any] | None) -> None:
        """Adds what the run's earlier starts were; once, when it is known where this one begins.

        Args:
          checkpoint: the account that the checkpoint keeps (`to_json`); None: the run begins at its first step.
        """
        # The file may be older than the checkpoint, by a few seconds; of what only grows the larger is the newer.
        known = [each for each in (_read(workdir / GOODPUT_FILE), checkpoint) if each]
        if not known:
            return
        kept = checkpoint["seconds"][STEPS] if checkpoint else 0.0
        for part in PARTS[1:]:
            self._seconds[part] += max(each["seconds"].get(part, 0.0) for each in known)
        self._seconds["redone"] += max(each["seconds"][STEPS] for each in known) - kept
        self._seconds[STEPS] += kept
        self.starts += max(each["starts"] for each in known)
        self.downtime += max(each["downtime"] for each in known)
        self.downtime += max(self._began - max(each["time"] for each in known), 0.0)

    def rewind(self, checkpoint: dict[str, Any] | None) -> None:
        """Takes back the time of steps since a checkpoint, whose account is given; None: of all of them."""
        kept = checkpoint["seconds"][STEPS] if checkpoint else 0.0
        self._seconds["rewound"] += self._seconds[STEPS] - kept
        self._seconds[STEPS] = kept
        self.book("rewound")

    def to_json(self) -> dict[str, Any]:
        """The account up to the last booking, as JSON values: what a checkpoint keeps."""
        return {
            "seconds": dict(self._seconds), "downtime": self.downtime, "starts": self.starts, "time": self._now()
        }  # fmt: skip

    def write(self, workdir: Path, at_once: bool = False) -> None:
        """Writes goodput.json, unless that was done a few seconds ago and need not be `at_once`.

        Where it cannot be written the account is a little less exact, and nothing else is wrong.
        """
        if at_once or self._monotonic() - self._written >= _SECONDS_BETWEEN_WRITES:
            with contextlib.suppress(OSError):
                write_whole(workdir / GOODPUT_FILE, json.dumps(self.to_json()) + "\n")
            self._written = self._monotonic()

    @property
    def wall_seconds(self) -> float:
        """All booked time: that of all starts, without the time between them."""
        return sum(self._seconds.values())

    def summary(self) -> dict[str, Any]:
        """The account for people: `share` of the time in steps that counted, `seconds` by part, time between starts."""
        return {
            "share": round(self._seconds[STEPS] / max(self.wall_seconds, 1e-9), 4),
            "seconds": {part: round(seconds, 1) for part, seconds in self._seconds.items()},
            "starts": self.starts,
            "downtime_seconds": round(self.downtime, 1),
        }

    def line(self) -> str:
        """The account in a line; parts that took less than a tenth of a second are left out."""
        summary = self.summary()
        rest = ", ".join(f"{part} {took:,.1f} s" for part, took in summary["seconds"].items() if took)
        down = f"; {self.starts} starts, {self.downtime:,.1f} s between them" if self.starts > 1 else ""
        return f"goodput {summary['share']:.1%} of {self.wall_seconds:,.1f} s: {rest}{down}"


def _read(path: Path) -> dict[str, Any] | None:
    """The account in a file; None where there is none, or something else."""
    try:
        account = json.loads(path.read_text(encoding="utf-8"))
        float(account["seconds"][STEPS]), float(account["downtime"]), int(account["starts"]), float(account["time"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nobody should lose a run over it
    return account
