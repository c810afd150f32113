"""Showing how far a corpus is: a bar on a terminal, a line now and then elsewhere. Always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Reports stages of work on a corpus; a disabled one says nothing (all hosts but the first)."""

    def __init__(self, enabled: bool, stream: TextIO | None = None):
        self._enabled = enabled
        self._stream = stream or sys.stderr

    def note(self, line: str) -> None:
        """Writes one line."""
        if self._enabled:
            print(line, file=self._stream, flush=True)

    @contextmanager
    def stage(self, label: str, total_bytes: int) -> Iterator["Stage"]:
        """Opens a stage that is done when `total_bytes` of the corpus's files have been read."""
        stage = Stage(label, total_bytes, self._enabled, self._stream)
        try:
            yield stage
        finally:
            stage.close()


class Stage:
    """Counts documents, bytes of files and tokens, and shows them with their rates."""

    def __init__(self, label: str, total_bytes: int, enabled: bool, stream: TextIO):
        self._label, self._total, self._enabled, self._stream = label, total_bytes, enabled, stream
        self._documents = self._bytes = self._tokens = self._skipped = 0
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if enabled and stream.isatty():
            self._bar = tqdm(
                total=total_bytes, desc=label, unit="B", unit_scale=True, file=stream, dynamic_ncols=True, leave=True
            )

    def skip(self, file_bytes: int) -> None:
        """Counts bytes that need no work, since it was done before."""
        self._skipped += file_bytes
        if self._bar is not None:
            self._bar.initial += file_bytes  # so that they do not count in the rate
            self._bar.n += file_bytes
            self._bar.refresh()

    def advance(self, file_bytes: int, documents: int = 0, tokens: int = 0) -> None:
        """Counts work done (0 where there are no documents or tokens)."""
        self._documents += documents
        self._bytes += file_bytes
        self._tokens += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(self._counts(), refresh=False)
            self._bar.update(file_bytes)
        elif self._enabled and time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._print_line()

    def _counts(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        parts = [f"{self._documents:,} documents"] if self._documents else []
        parts += [f"{self._tokens / seconds:,.0f} tokens/s"] if self._tokens else []
        return ", ".join(parts)

    def _print_line(self) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        done = self._skipped + self._bytes
        left = seconds * (self._total - done) / self._bytes if self._bytes else float("nan")
        counts = f"{counts}, " if (counts := self._counts()) else ""
        print(
            f"{self._label}: {done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {counts}"
            f"{self._bytes / 1e6 / seconds:,.1f} MB/s, {max(left, 0):,.0f} s left",
            file=self._stream,
            flush=True,
        )

    def close(self) -> None:
        """Shows the final counts."""
        if self._bar is not None:
            self._bar.close()
        elif self._enabled:
            parts = [part for part in (self._counts(), f"{time.monotonic() - self._start:,.1f} s") if part]
            print(f"{self._label}: {', '.join(parts)}", file=self._stream, flush=True)
