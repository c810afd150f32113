"""What every reader offers: the places of a file it can be read from, and the documents there, in pieces.

A corpus is cut into spans that are read independently of each other, so that many processes can share one file. What a
span yields depends on the file and the span alone.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

# A document longer than this comes, and is tokenised, in pieces: memory stays bounded whatever its length.
PIECE_CHARACTERS = 1 << 20
# Documents are told apart by a hash of their beginning, so that a long one need not be read to know its hash.
HASHED_BYTES = 1 << 16

# Behind such a line break a text may be cut, and its parts tokenised alone: no tokenizer in use joins a line break and
# the visible character behind it, and a run of white space is not torn.
_CLEAN_CUT = re.compile(r"\S\r?\n(?=\S)")
_SEARCHED_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class ReaderOptions:
    """What a user can choose about reading.

    Attributes:
      text_field: the field of a JSON line, a Parquet row or a data set's example that holds the document: text, or
        a list of token ids.
      packed_rows: rows of token ids are stretches of one stream, not documents: nothing is put between them.
    """

    text_field: str
    packed_rows: bool


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus.

    Attributes:
      name: unique in the corpus, below its root; what the order of the corpus goes by.
      path: what it is opened by: a local path, a URL that fsspec knows, or `tfds:NAME/SPLIT`.
      size: in bytes as stored (0 if unknown).
      stamp: something that changes when the file does (time of change, etag, version).
      named: asked for by its own name, not found in a directory: then nothing about it is passed over.
    """

    name: str
    path: str
    size: int
    stamp: str
    named: bool


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one file, in the unit of its reader (bytes, rows, row groups).

    Attributes:
      file: number of the file in the corpus.
      start, stop: the stretch; documents (of text files: characters) that begin in it are its own.
      input_bytes: about how many bytes of the file, as stored, lie in it; for balance and progress.
    """

    file: int
    start: int
    stop: int
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document; nearly always the whole document.

    Attributes:
      content: its text, or its token ids (1-D, an integer dtype) where the corpus is tokenised already.
      source: where it stands, for people: "file", "file:line", "file, row 7".
      document_hash: hash of the document's beginning, uniform in [0, 2**64), equal in all its pieces.
      offset: bytes of UTF-8 (or ids) of the document before this piece.
      is_last: whether the document ends with it; never so in a row of a stream (`packed_rows`).
      input_bytes: how many bytes of the file, as stored, were used up since the piece before; for progress.
    """

    content: str | np.ndarray
    source: str
    document_hash: int
    offset: int
    is_last: bool
    input_bytes: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """A document that cannot be read and is passed over: where it stands and why."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file that is not of the kind it should be and is passed over: its name and why."""

    name: str
    reason: str


class Reader(ABC):
    """Reads files of one format. Instances are small and can be sent to other processes."""

    def __init__(self, options: ReaderOptions):
        self.options = options

    @abstractmethod
    def plan(self, number: int, file: CorpusFile, span_bytes: int) -> list[Span]:
        """Cuts a file into spans of about `span_bytes`, in order and without gaps; reads as little as it can.

        Args:
          number: of the file in the corpus, for `Span.file`.
          span_bytes: of the file as stored; of its content where it is compressed and larger than this.

        Raises:
          UserError: the file cannot be read, is damaged, or has no such field.
        """

    @abstractmethod
    def read(self, file: CorpusFile, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        """Yields the documents of a span in order, never holding more than a few MiB where the format allows it.

        Raises:
          UserError: the file cannot be read or is damaged, with the place.
        """


def hash_of(beginning: bytes) -> int:
    """Returns the hash of a document by its first `HASHED_BYTES` bytes (more are ignored), in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(beginning[:HASHED_BYTES], digest_size=8).digest(), "little")


def pieces_of_text(text: str, source: str, input_bytes: int) -> Iterator[Piece]:
    """Yields a document that is in memory as one piece, or several if it is long."""
    beginning = text[:HASHED_BYTES].encode()  # a character is a byte or more
    document_hash = hash_of(beginning)
    if len(text) <= PIECE_CHARACTERS:
        yield Piece(text, source, document_hash, 0, True, input_bytes)
        return
    start = offset = 0
    while start < len(text):
        part = text[start : start + PIECE_CHARACTERS]
        if start + len(part) < len(text):
            part = part[: clean_cut(part)]
        start += len(part)
        yield Piece(part, source, document_hash, offset, start == len(text), input_bytes if offset == 0 else 0)
        offset += len(part.encode())


def pieces_of_ids(ids: np.ndarray, source: str, input_bytes: int, packed: bool) -> Iterator[Piece]:
    """Yields a document that is tokenised already, or a row of a stream of such, as one piece."""
    document_hash = hash_of(np.ascontiguousarray(ids, "<i8")[: HASHED_BYTES // 8].tobytes())
    yield Piece(ids, source, document_hash, 0, not packed, input_bytes)


def clean_cut(text: str) -> int:
    """Returns where to cut `text`, in (0, len(text)], when more of the document follows.

    That is behind the last line break that stands between visible characters, if one is near the end; else before the
    last word; else at the end.
    """
    start = max(0, len(text) - _SEARCHED_CHARACTERS)
    cuts = [match.end() for match in _CLEAN_CUT.finditer(text, start)]
    if cuts:
        return cuts[-1]
    space = max(text.rfind(" ", start), text.rfind("\n", start))
    return space if space > 0 else len(text)
