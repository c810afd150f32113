"""Reading a whole corpus in the tests of readers, and what must hold of the pieces of any."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from latentjax.data.corpus import Corpus
from latentjax.data.readers.base import HASHED_BYTES, LeftOut, Malformed, Piece, ReaderOptions, hash_of

REPOSITORY = Path(__file__).parents[2]


def open_corpus(path, include=("**/*",), exclude=(), text_field="text", packed_rows=False) -> Corpus:
    return Corpus(path, include, exclude, ReaderOptions(text_field, packed_rows))


def read(corpus: Corpus, span_bytes: int = 1 << 30) -> list[Piece | Malformed | LeftOut]:
    """Everything that the spans of a corpus yield, in order; checks that they have no gaps and count every byte."""
    spans = corpus.spans(span_bytes)
    for number, file in enumerate(corpus.files):
        own = [span for span in spans if span.file == number]
        assert own[0].start == 0
        assert all(before.stop == after.start for before, after in itertools.pairwise(own))
        assert sum(span.input_bytes for span in own) == file.size
    return [item for span in spans for item in corpus.read(span)]


def joined(items: list[Piece | Malformed | LeftOut]) -> list:
    """The documents (text, or lists of ids) that pieces make up; checks offsets and hashes. Others are passed over."""
    documents, parts = [], []
    for piece in items:
        if not isinstance(piece, Piece):
            continue
        is_text = isinstance(piece.content, str)
        assert piece.offset == sum(len(part.content.encode()) if is_text else len(part.content) for part in parts)
        parts.append(piece)
        assert {part.document_hash for part in parts} == {piece.document_hash}
        if piece.is_last:
            if is_text:
                document = "".join(part.content for part in parts)
                beginning = document.encode()[:HASHED_BYTES]
            else:
                document = np.concatenate([part.content for part in parts]).tolist()
                beginning = np.array(document[: HASHED_BYTES // 8], "<i8").tobytes()
            assert piece.document_hash == hash_of(beginning)
            documents.append(document)
            parts = []
    assert not parts
    return documents


def documents_of(corpus: Corpus, span_bytes: int = 1 << 30) -> list:
    return joined(read(corpus, span_bytes))


def malformed_in(items: list) -> list[Malformed]:
    return [item for item in items if isinstance(item, Malformed)]


_MEASURE = """
import resource, sys
from latentjax.data.corpus import Corpus
from latentjax.data.readers.base import Piece, ReaderOptions

corpus = Corpus(sys.argv[1], ["**/*"], [], ReaderOptions("text", False))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
characters = documents = 0
for span in corpus.spans(int(sys.argv[2])):
    for piece in corpus.read(span):
        assert isinstance(piece, Piece), piece
        characters += len(piece.content)
        documents += piece.is_last
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(characters, documents, (after - before) // 1024)
"""


def measure(path: Path, span_bytes: int) -> tuple[int, int, int]:
    """Reads a corpus in a process of its own: its characters, documents, and the growth of peak memory in MiB."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", _MEASURE, str(path), str(span_bytes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    characters, documents, growth = map(int, run.stdout.split())
    return characters, documents, growth
