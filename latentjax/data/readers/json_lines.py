"""JSON lines: every line is a document, the text or the token ids in one field of the object there."""

import codecs
import json
from collections.abc import Iterator

import numpy as np

from latentjax.data.readers.base import (
    CorpusFile,
    LeftOut,
    Malformed,
    Piece,
    Reader,
    Span,
    pieces_of_ids,
    pieces_of_text,
)
from latentjax.data.readers.compressed import Content, compression_of, leave, open_at, plan_by_bytes, resume
from latentjax.data.readers.long_lines import pieces_of_long_line
from latentjax.data.readers.text import count_line_breaks
from latentjax.data.readers.values import BadDocument, ids_of, text_of
from latentjax.errors import UserError

# A longer line is not held in memory.
LONG_LINE_BYTES = 32 << 20
_CHUNK_BYTES = 1 << 20


class JsonLinesReader(Reader):
    """Reads JSON lines, plain or compressed. A line belongs to the span that it begins in."""

    def plan(self, number: int, file: CorpusFile, span_bytes: int) -> list[Span]:
        return plan_by_bytes(number, file, span_bytes, span_bytes)

    def read(self, file: CorpusFile, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        content = resume(file, span.start) or _open_at_line(file, span.start)
        try:
            yield from _documents(content, file, span, self.options.text_field, self.options.packed_rows)
        except BaseException:
            content.close()
            raise
        leave(file, span.stop, content)


def _documents(content: Content, file: CorpusFile, span: Span, field: str, packed: bool) -> Iterator[Piece | Malformed]:
    # What a later span of a plain file yields must not depend on what was read before: there a document is told by its
    # place, and lines are counted for the sake of errors only.
    by_line = span.start == 0 or compression_of(file.path) is not None
    used = content.stored()
    while (begin := content.position) < span.stop and (line := content.readline(LONG_LINE_BYTES)):
        source = f"{file.path}:{content.line}" if by_line else f"{file.path}:@{begin}"
        if begin == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        try:
            if len(line) == LONG_LINE_BYTES and not line.endswith(b"\n"):
                yield from _long_line(content, line, field, source, used, packed)
                used = content.stored()
            elif not line.isspace():
                value = _value(line, field)
                used, before = content.stored(), used
                if isinstance(value, str):
                    yield from pieces_of_text(value, source, used - before)
                else:
                    yield from pieces_of_ids(value, source, used - before, packed)
        except BadDocument as error:
            if content.line is None:
                content.line = _line_at(file, begin)
            yield Malformed(f"{file.path}:{content.line}", str(error))
        if content.line is not None:
            content.line += 1


def _long_line(content: Content, beginning: bytes, field: str, source: str, used: int, packed: bool) -> Iterator[Piece]:
    """Yields the document of a line that is too long to be read at once."""
    chunks = _chunks(content, beginning)
    del beginning
    is_begun = False
    try:
        for piece in pieces_of_long_line(chunks, field, source, used, content.stored, packed):
            is_begun = True
            yield piece
    except BadDocument as error:
        if is_begun:
            raise UserError(f"{source}: {error} (in a line so long that part of it was taken up already)") from error
        for _ in chunks:
            pass  # go to the next line
        raise


def _chunks(content: Content, beginning: bytes) -> Iterator[bytes]:
    """Yields a line that begins so."""
    for start in range(0, len(beginning), _CHUNK_BYTES):
        yield beginning[start : start + _CHUNK_BYTES]
    del beginning
    while (chunk := content.readline(_CHUNK_BYTES)) and not chunk.endswith(b"\n"):
        yield chunk
    if chunk:
        yield chunk


def _value(line: bytes, field: str) -> str | np.ndarray:
    """Returns the text, or the token ids, in a field of a line.

    Raises:
      BadDocument: there is none.
    """
    try:
        record = json.loads(line.rstrip().decode())
    except UnicodeDecodeError as error:
        raise BadDocument(f"not UTF-8 text (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise BadDocument(f"not a JSON line: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise BadDocument(f"not a JSON line that can be read: {error}") from error
    if not isinstance(record, dict):
        raise BadDocument(f"a line must hold a JSON object, not {type(record).__name__}")
    if field not in record:
        raise BadDocument(f"no field {field!r}; the line has {', '.join(map(repr, record)) or 'none'}")
    value = record[field]
    if isinstance(value, str):
        return text_of(value, field)
    if isinstance(value, list):
        return ids_of(value, field)
    raise BadDocument(f"field {field!r} is {type(value).__name__}, not a string")


# The place where lines were counted last, and the number of the line there: the next is rarely before it.
_counted: list[tuple[CorpusFile, int, int]] = []


def _line_at(file: CorpusFile, position: int) -> int:
    """Returns the number of the line that begins at `position` of a plain file."""
    known = [(place, line) for counted, place, line in _counted if counted == file and place <= position]
    start, line = known[0] if known else (0, 1)
    line += count_line_breaks(file, start, position)
    _counted[:] = [(file, position, line)]
    return line


def _open_at_line(file: CorpusFile, start: int) -> Content:
    """Opens a file at the first line that begins at `start` or behind it."""
    if start == 0:
        return Content(file)
    content = open_at(file, start - 1)
    while (part := content.readline(_CHUNK_BYTES)) and not part.endswith(b"\n"):
        pass
    if content.line is not None:
        content.line += 1
    return content
