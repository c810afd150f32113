"""Text files: a whole file is one document, exactly as it is."""

import codecs
import functools
import re
from collections.abc import Callable, Iterable, Iterator

from latentjax.data.readers.base import (
    HASHED_BYTES,
    PIECE_CHARACTERS,
    CorpusFile,
    LeftOut,
    Malformed,
    Piece,
    Reader,
    Span,
    clean_cut,
    hash_of,
)
from latentjax.data.readers.compressed import Content, leave, open_at, plan_by_bytes, resume
from latentjax.errors import UserError

# A file up to this size is one span, however small spans are asked for.
WHOLE_BYTES = 16 << 20
# A file found in a directory that is no text so far is of another kind and left out; later on, it is damaged.
CHECKED_BYTES = 16 << 20
# The boundary between two spans lies at most so far behind its nominal place.
SEARCHED_BYTES = 1 << 16

_CHUNK_BYTES = 1 << 20
# As in `clean_cut`, text is cut between visible characters if possible.
_LINE_END = re.compile(rb"\S\r?\n(?=\S)")
_BEFORE = 3  # bytes in front of a boundary that this looks at


class NotText(Exception):
    """Bytes that are not UTF-8: the position of the first one in the content of the file, and its value."""

    def __init__(self, position: int, byte: int):
        super().__init__(f"not UTF-8 text (byte 0x{byte:02x} at {position})")
        self.position = position


class TextReader(Reader):
    """Reads UTF-8 text, plain or compressed. The spans of a large file share one document."""

    def plan(self, number: int, file: CorpusFile, span_bytes: int) -> list[Span]:
        # No boundary may be moved beyond the next one.
        step = max(span_bytes, 2 * (SEARCHED_BYTES + _BEFORE))
        return plan_by_bytes(number, file, step, max(span_bytes, WHOLE_BYTES))

    def read(self, file: CorpusFile, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        if span.start == 0:
            content, used = Content(file), 0
            document_hash, fault = _examine(content, file.named)
            if fault and not file.named:
                content.close()
                yield LeftOut(file.name, fault)
                return
        else:
            document_hash, fault = _examine_anew(file)
            if fault and not file.named:
                return
            content = resume(file, span.start) or _open_at_boundary(file, span.start)
            used = content.stored()
        try:
            texts = decoded(_chunks(content, span.stop), content.position)
            yield from pieces_of_stream(
                texts, file.path, content.position, document_hash, used, content.stored, content.is_at_end
            )
        except NotText as error:
            content.close()
            line = count_line_breaks(file, 0, error.position) + 1
            raise UserError(f"{file.path}:{line}: {error}") from error
        except BaseException:
            content.close()
            raise
        leave(file, span.stop, content)


def pieces_of_stream(
    texts: Iterable[str],
    source: str,
    offset: int,
    document_hash: int | None,
    used: int,
    stored: Callable[[], int],
    is_at_end: Callable[[], bool],
) -> Iterator[Piece]:
    """Yields a document, or the part of one from `offset` on, that comes bit by bit, in the pieces of `pieces_of_text`.

    Args:
      texts: the document; all of it has been taken before the last piece is yielded.
      offset: bytes of UTF-8 of the document before `texts`.
      document_hash: None if `texts` begin at the document's beginning and it is to be made here.
      used: how many bytes of the file, as stored, had been used before `texts`.
      stored: how many have been so far.
      is_at_end: asked when `texts` is exhausted, whether the document ends there.
    """
    waiting, is_empty = "", offset == 0
    for text in texts:
        waiting += text
        while len(waiting) > PIECE_CHARACTERS:
            if document_hash is None:
                document_hash = _hash_of_text(waiting)
            part = waiting[: clean_cut(waiting[:PIECE_CHARACTERS])]
            waiting = waiting[len(part) :]
            used, before = stored(), used
            yield Piece(part, source, document_hash, offset, False, used - before)
            offset += len(part.encode())
            is_empty = False
    if waiting or is_empty:
        if document_hash is None:
            document_hash = _hash_of_text(waiting)
        yield Piece(waiting, source, document_hash, offset, is_at_end(), stored() - used)


def decoded(chunks: Iterable[bytes], position: int, is_whole: bool = True) -> Iterator[str]:
    """Yields bytes as text.

    Args:
      position: of the first chunk, for errors.
      is_whole: whether they end with a whole character.

    Raises:
      NotText: they are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chunks:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk)
        except UnicodeDecodeError as error:
            raise NotText(position - pending + error.start, error.object[error.start]) from error
        position += len(chunk)
        yield text
    pending = decoder.getstate()[0]
    if pending and is_whole:
        raise NotText(position - len(pending), pending[0])


def count_line_breaks(file: CorpusFile, start: int, stop: int) -> int:
    """Returns how many line breaks there are in a stretch of the content of a file."""
    content = Content(file, start)
    try:
        count = 0
        while data := content.read(min(_CHUNK_BYTES, stop - content.position)):
            count += data.count(b"\n")
        return count
    finally:
        content.close()


def _hash_of_text(text: str) -> int:
    return hash_of(text[:HASHED_BYTES].encode())  # a character is a byte or more


def _examine(content: Content, named: bool) -> tuple[int, str]:
    """Returns the hash of the document, and what is wrong with its beginning; leaves `content` where it is."""
    beginning = content.read(HASHED_BYTES if named else max(HASHED_BYTES, CHECKED_BYTES))
    is_whole = content.is_at_end() and len(beginning) <= CHECKED_BYTES
    content.unread(beginning)
    fault = ""
    if not named:
        checked = beginning[:CHECKED_BYTES]
        parts = (checked[start : start + _CHUNK_BYTES] for start in range(0, len(checked), _CHUNK_BYTES))
        try:
            for _ in decoded(parts, 0, is_whole):
                pass
        except NotText as error:
            fault = str(error)
    return hash_of(beginning), fault


@functools.lru_cache(maxsize=4)
def _examine_anew(file: CorpusFile) -> tuple[int, str]:
    """The same for the later spans of a file: all of them, in whatever process, must come to the same answer."""
    content = Content(file)
    try:
        return _examine(content, file.named)
    finally:
        content.close()


def _chunks(content: Content, stop: int) -> Iterator[bytes]:
    """Yields the content up to the boundary that belongs to `stop`, and leaves the rest unread."""
    while content.position < stop - _BEFORE:
        data = content.read(min(_CHUNK_BYTES, stop - _BEFORE - content.position))
        if not data:
            return
        yield data
    window = content.read(_BEFORE + SEARCHED_BYTES)
    place = _boundary_in(window)
    content.unread(window[place:])
    yield window[:place]


def _open_at_boundary(file: CorpusFile, start: int) -> Content:
    """Opens a file at the boundary that belongs to `start`: where the span before it, read elsewhere, leaves off."""
    content = open_at(file, start - _BEFORE)
    window = content.read(_BEFORE + SEARCHED_BYTES)
    content.unread(window[_boundary_in(window) :])
    return content


def _boundary_in(window: bytes) -> int:
    """Returns where the text is cut, in a stretch of it that begins `_BEFORE` bytes in front of the nominal place."""
    for match in _LINE_END.finditer(window):
        if match.end() >= _BEFORE:
            return match.end()
    line_end = window.find(b"\n", _BEFORE - 1) + 1
    if line_end:
        return line_end
    place = _BEFORE
    while place < min(len(window), _BEFORE + 3) and window[place] & 0xC0 == 0x80:
        place += 1  # a byte in the middle of a character
    return min(place, len(window))
