"""JSON lines too long to be held in memory: one field of the object there, bit by bit.

What this reads, and what it refuses, is what `json.loads` does, but for three things: a field that stands twice in the
line and nesting deeper than any document's are refused, and a fault behind the field comes to light late.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import numpy as np

from latentjax.data.readers.base import Piece, pieces_of_ids
from latentjax.data.readers.text import NotText, decoded, pieces_of_stream
from latentjax.data.readers.values import BadDocument, ids_of

_PIECE_IDS = 1 << 18
_NAMED_KEYS = 20
_KEY_CHARACTERS = 1 << 16
_DEEPEST = 1000
_LONGEST_SCALAR = 4300  # digits, as in Python

_SPACE = re.compile(r"[ \t\r\n]*+")
_IN_STRING = re.compile(r'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')
_LONGEST_ESCAPE = 6
_IN_SCALAR = re.compile(r"[-+.0-9A-Za-z]*+")
_SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null|NaN|-?Infinity")
_SURROGATE = re.compile("[\ud800-\udfff]")


def pieces_of_long_line(
    chunks: Iterable[bytes], field: str, source: str, used: int, stored: Callable[[], int], packed: bool
) -> Iterator[Piece]:
    """Yields the document in a line, in pieces; the last one when the whole line was found to be sound.

    Args:
      chunks: the line; each chunk is small enough to be held a few times.
      used: how many bytes of the file, as stored, had been used before the line.
      stored: how many have been so far.

    Raises:
      BadDocument: the line is malformed, has no such field, or it is neither text nor token ids.
    """
    parts = _field(_Scanner(_texts(chunks)), field)
    first = next(parts)
    if isinstance(first, str):
        texts = cast(Iterator[str], parts)  # of one value, all parts are of one kind
        yield from pieces_of_stream(texts, source, 0, None, used, stored, lambda: True)
    else:
        yield from _pieces_of_ids([first], parts, source, used, stored, packed)


def _pieces_of_ids(
    waiting: list[np.ndarray], parts: Iterator, source: str, used: int, stored: Callable[[], int], packed: bool
) -> Iterator[Piece]:
    offset, document_hash = 0, None
    for part in parts:
        if sum(map(len, waiting)) >= _PIECE_IDS:
            ids = np.concatenate(waiting)
            if document_hash is None:
                document_hash = next(pieces_of_ids(ids, source, 0, packed)).document_hash
            used, before = stored(), used
            yield Piece(ids, source, document_hash, offset, False, used - before)
            offset += len(ids)
            waiting = []
        waiting.append(part)
    (piece,) = pieces_of_ids(np.concatenate(waiting), source, stored() - used, packed)
    if document_hash is None:
        document_hash = piece.document_hash
    yield Piece(piece.content, source, document_hash, offset, piece.is_last, piece.input_bytes)


def _texts(chunks: Iterable[bytes]) -> Iterator[str]:
    try:
        yield from decoded(chunks, 0)
    except NotText as error:
        raise BadDocument(f"not UTF-8 text (byte {error.position + 1} of the line)") from error


def _field(scanner: "_Scanner", field: str) -> Iterator[str | np.ndarray]:
    """Yields the value of a field of the object in the line, in parts, at least one; then reads to the line's end."""
    kind = scanner.peek()
    if kind != "{":
        names = {"[": "list", '"': "str"}
        if kind not in names:
            scanner.scalar()
        raise BadDocument(f"a line must hold a JSON object, not {names.get(kind, 'a single value')}")
    scanner.take()
    keys = []
    if scanner.peek() == "}":
        scanner.take()
    else:
        separator = ","
        while separator == ",":
            key = scanner.key()
            if key != field:
                scanner.skip_value()
            elif key in keys:
                raise BadDocument(f"field {field!r} stands twice in a long line")
            else:
                yield from _value(scanner, field)
            if key == field or len(keys) < _NAMED_KEYS:
                keys.append(key)
            separator = scanner.take()
        if separator != "}":
            scanner.fail("expected ',' or '}'")
    if scanner.peek():
        scanner.fail("extra data")
    if field not in keys:
        raise BadDocument(f"no field {field!r}; the line has {', '.join(map(repr, keys)) or 'none'}")


def _value(scanner: "_Scanner", field: str) -> Iterator[str | np.ndarray]:
    kind = scanner.peek()
    if kind == '"':
        yield ""
        for part in scanner.string():
            if _SURROGATE.search(part):
                raise BadDocument(f"field {field!r} holds half of a surrogate pair, which is no character")
            yield part
    elif kind == "[":
        for part in scanner.numbers():
            yield ids_of(part, field)
    else:
        scanner.skip_value()
        raise BadDocument(f"field {field!r} is not a string")


def _run(pattern: re.Pattern[str], text: str, start: int) -> re.Match[str]:
    """The match of a pattern that matches anything, were it by nothing."""
    found = pattern.match(text, start)
    assert found is not None
    return found


class _Scanner:
    """Takes JSON apart that comes bit by bit."""

    def __init__(self, texts: Iterator[str]):
        self._texts = texts
        self._buffer, self._at, self._passed = "", 0, 0

    def fail(self, what: str) -> None:
        raise BadDocument(f"not a JSON line: {what} at character {self._passed + self._at + 1}")

    def peek(self) -> str:
        """Returns the next character that is no space; "" at the end."""
        while True:
            self._at = _run(_SPACE, self._buffer, self._at).end()
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def take(self) -> str:
        """The same, and goes behind it."""
        character = self.peek()
        self._at += len(character)
        return character

    def key(self) -> str:
        """Takes the name of a field and the colon behind it; of a name longer than any, the beginning."""
        if self.peek() != '"':
            self.fail("expected a property name in double quotes")
        name = ""
        for part in self.string():
            name += part[: _KEY_CHARACTERS - len(name)]
        if self.take() != ":":
            self.fail("expected ':'")
        return name

    def string(self) -> Iterator[str]:
        """Yields the string that begins here, in parts; none is empty or ends within a surrogate pair."""
        self._at += 1
        while True:
            run = _run(_IN_STRING, self._buffer, self._at)
            text = json.decoder.scanstring(run.group() + '"', 0)[0]  # pyright: ignore[reportAttributeAccessIssue]  # no stub
            self._at = run.end()
            left = len(self._buffer) - self._at
            is_cut = left == 0 or (left < _LONGEST_ESCAPE and self._buffer[self._at] == "\\")
            if is_cut and "\ud800" <= text[-1:] <= "\udbff":
                self._at -= _LONGEST_ESCAPE  # its other half may follow
                text = text[:-1]
            if text:
                yield text
            if not is_cut and self._buffer[self._at] == '"':
                self._at += 1
                return
            if not is_cut:
                is_line_end = self._buffer[self._at] in "\r\n"
                self.fail("unterminated string" if is_line_end else "invalid escape or control character")
            if not self._more():
                self.fail("unterminated string")

    def numbers(self) -> Iterator[list]:
        """Yields the list that begins here, in parts, at least one. Only a list of numbers comes through whole."""
        self._at += 1
        is_first = True
        while True:
            end = self._buffer.find("]", self._at)
            cut = end if end >= 0 else self._buffer.rfind(",", self._at)
            if cut >= 0:
                try:
                    values = json.loads(f"[{self._buffer[self._at : cut]}]")
                except (ValueError, RecursionError):
                    self.fail("not a list of numbers")
                if not values and not (is_first and end >= 0):
                    self.fail("expected a value")
                self._at, is_first = cut + 1, False
                yield values
                if end >= 0:
                    return
            elif len(self._buffer) - self._at > _LONGEST_SCALAR + (1 << 20):
                self.fail("not a list of numbers")
            if not self._more():
                self.fail("unterminated list")

    def scalar(self) -> None:
        """Passes over a number, true, false or null."""
        self.peek()
        while (end := _run(_IN_SCALAR, self._buffer, self._at).end()) == len(self._buffer):
            if end - self._at > _LONGEST_SCALAR or not self._more():
                break
        end = _run(_IN_SCALAR, self._buffer, self._at).end()
        if end - self._at > _LONGEST_SCALAR or not _SCALAR.fullmatch(self._buffer, self._at, end):
            self.fail("expected a value")
        self._at = end

    def skip_value(self) -> None:
        """Passes over a value of any kind."""
        closing = []  # of the lists and objects around this place
        while True:
            character = self.peek()
            if character == '"':
                for _ in self.string():
                    pass
            elif character and character in "[{":
                self.take()
                closing.append("]" if character == "[" else "}")
                if len(closing) > _DEEPEST:
                    self.fail("nested too deep")
                if self.peek() != closing[-1]:
                    if character == "{":
                        self.key()
                    continue
            else:
                self.scalar()
            # A value is complete, or (after an opening bracket) there is none.
            while closing and self.peek() == closing[-1]:
                self.take()
                closing.pop()
            if not closing:
                return
            if self.take() != ",":
                self.fail(f"expected ',' or '{closing[-1]}'")
            if closing[-1] == "}":
                self.key()

    def _more(self) -> bool:
        """Gets more of the line; returns whether there was any."""
        for text in self._texts:
            if text:
                self._passed += self._at
                self._buffer, self._at = self._buffer[self._at :] + text, 0
                return True
        return False
