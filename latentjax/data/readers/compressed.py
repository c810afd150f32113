"""The content of a file, plain or compressed (gzip, Zstandard), read forward from any place.

A compressed file can only be read from its beginning. So the stream that a span was read from is kept, and goes on
from there: a process that reads spans of a file in order, even if it is not all of them, decompresses it once.
"""

import gzip
import io
import os
import sys
import zlib

from latentjax.data import remote
from latentjax.data.readers.base import CorpusFile, Span
from latentjax.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# The end of a file whose length is not known.
TO_THE_END = 2**63 - 1

_KINDS = {".gz": "gzip", ".zst": "zst", ".zstd": "zst"}
_STEP = 1 << 20
# Frames made with `zstd --long=31` need windows that the library does not grant unasked.
_WINDOW = zstd.DecompressionParameter.window_log_max
_ZSTD_OPTIONS: dict[int, int] = {_WINDOW: _WINDOW.bounds()[1]}


def compression_of(path: str) -> str | None:
    """Returns how a file is compressed, "gzip" or "zst", by the end of its name; None if it is not."""
    return _KINDS.get(os.path.splitext(path.lower())[1])


class Content:
    """The decompressed content of a file from some position on.

    Attributes:
      position: in bytes of the content, of what is read next.
      line: number of the line break before `position`, plus 1; None if unknown (a plain file opened further behind).
    """

    def __init__(self, file: CorpusFile, position: int = 0):
        """Opens a file and goes to `position` of its content (or its end, if that comes earlier).

        Raises:
          UserError: as `read`.
        """
        self.position, self.line = 0, 1
        self._file = remote.open_binary(file.path)
        self._kind = compression_of(file.path)
        self._pushed = b""
        if self._kind is None:
            self._content = self._file
            if position:
                self._file.seek(position)
                self.position, self.line = position, None
            return
        self._content = io.BufferedReader(_Decompressed(self._file, self._kind, file.path), _STEP)
        self.skip_to(position)

    def skip_to(self, position: int) -> None:
        """Reads on to a later `position` (or the end) and counts the lines on the way; as `read`."""
        assert self.line is not None  # what is compressed is read from its beginning, and its lines counted
        while self.position < position and (data := self.read(min(_STEP, position - self.position))):
            self.line += data.count(b"\n")

    def read(self, size: int) -> bytes:
        """Returns the next `size` bytes, fewer only at the end of the file. It leaves `line` to the caller.

        Raises:
          UserError: the file cannot be read, or is damaged.
        """
        data = self._pushed[:size]
        self._pushed = self._pushed[size:]
        if len(data) < size:
            data += self._content.read(size - len(data))
        self.position += len(data)
        return data

    def unread(self, data: bytes) -> None:
        """Puts back what was read last."""
        self._pushed = data + self._pushed
        self.position -= len(data)

    def is_at_end(self) -> bool:
        """Returns whether nothing is left to read."""
        byte = self.read(1)
        self.unread(byte)
        return not byte

    def readline(self, size: int) -> bytes:
        """Returns the next bytes up to a line break and with it, at most `size`; not after `unread`. As `read`."""
        data = self._content.readline(size)
        self.position += len(data)
        return data

    def stored(self) -> int:
        """Returns how many bytes of the file, as stored, were used up to get here."""
        return self.position if self._kind is None else self._file.raw.consumed

    def close(self) -> None:
        """Closes the file."""
        self._content.close()
        self._file.close()


# The stream that a span was read from last, and the place where that span ends, by process and file. A forked process
# must not go on with its parent's: they would share one position in the file.
_kept: dict[tuple[int, str, str], tuple[int, Content]] = {}


def resume(file: CorpusFile, start: int) -> Content | None:
    """Returns the content as the span that ends at `start` left it, if that was the last one read in this process."""
    stop, content = _kept.get(_key(file), (None, None))
    if stop != start:
        return None
    del _kept[_key(file)]
    return content


def open_at(file: CorpusFile, position: int) -> Content:
    """Returns the content from `position` on; of a compressed file by reading on from an earlier span, if one was read.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    _, content = _kept.get(_key(file), (None, None))
    if content is None or compression_of(file.path) is None or content.position > position:
        return Content(file, position)
    del _kept[_key(file)]
    content.skip_to(position)
    return content


def leave(file: CorpusFile, stop: int, content: Content) -> None:
    """Keeps the content for the span that begins at `stop`; closes the one kept before."""
    if stop == TO_THE_END:
        content.close()
        return
    kept = list(_kept.items())
    _kept.clear()
    for (process, *_), (_, other) in kept:
        if process == os.getpid():
            other.close()
    _kept[_key(file)] = stop, content


def _key(file: CorpusFile) -> tuple[int, str, str]:
    return os.getpid(), file.path, file.stamp


def plan_by_bytes(number: int, file: CorpusFile, span_bytes: int, whole_bytes: int) -> list[Span]:
    """Cuts a file at multiples of `span_bytes` of its content, unless it is stored in `whole_bytes` or less.

    A compressed file that is cut is decompressed for it, to learn the length of its content.

    Raises:
      UserError: the file cannot be read, or is damaged.
    """
    if file.size <= whole_bytes:
        return [Span(number, 0, TO_THE_END, file.size)]
    length = file.size if compression_of(file.path) is None else _content_length(file)
    starts = range(0, max(length, 1), span_bytes)
    # The last one goes to the end, whatever the length: what is cut short must be met by a reader, not passed over.
    stops = [*starts[1:], TO_THE_END]
    shares = [file.size * min(stop, length) // max(length, 1) for stop in (0, *stops)]
    return [
        Span(number, start, stop, after - before)
        for start, stop, before, after in zip(starts, stops, shares, shares[1:])
    ]


def _content_length(file: CorpusFile) -> int:
    content = Content(file)
    try:
        while content.read(_STEP):
            pass
        return content.position
    finally:
        content.close()


class _Decompressed(io.RawIOBase):
    """Decompresses a stream; damage becomes a `UserError`, a file cut short above all."""

    def __init__(self, stored, kind: str, path: str):
        super().__init__()
        self._stored, self._kind, self._path = stored, kind, path
        self._stream = gzip.GzipFile(fileobj=stored) if kind == "gzip" else zstd.ZstdFile(stored, options=_ZSTD_OPTIONS)
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        try:
            count = self._stream.readinto(buffer)
            if count == 0 and self._stored.raw.consumed == 0:
                raise EOFError("it is empty")  # which gzip takes for a file of no members
        except (EOFError, gzip.BadGzipFile, zlib.error, zstd.ZstdError) as error:
            raise UserError(
                f"{self._path}: damaged {self._kind} file: {error} (after {self._position} bytes of content)"
            ) from error
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
