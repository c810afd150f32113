"""Text files: read whole and in spans, plain and compressed."""

import dataclasses
import gzip
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import documents_of, joined, measure, open_corpus, read

from latentjax.data.readers import compressed, text
from latentjax.data.readers.base import PIECE_CHARACTERS, LeftOut, pieces_of_text
from latentjax.data.readers.compressed import zstd
from latentjax.errors import UserError

SPAN_BYTES = [1, 7, 100, 1000, 5000]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress}


@pytest.fixture
def small_limits(monkeypatch):
    """Limits so small that little files have many spans."""
    monkeypatch.setattr(text, "WHOLE_BYTES", 0)
    monkeypatch.setattr(text, "SEARCHED_BYTES", 12)
    monkeypatch.setattr(text, "CHECKED_BYTES", 200)
    monkeypatch.setattr(text, "_CHUNK_BYTES", 5)
    text._examine_anew.cache_clear()


def write(path, content: str | bytes, suffix=""):
    data = content.encode() if isinstance(content, str) else content
    path = path.with_name(path.name + suffix)
    path.write_bytes(COMPRESS[suffix](data))
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_file_is_one_document_exactly_as_it_is(tmp_path, suffix):
    content = b"\xef\xbb\xbfa\r\nb\xc3\xa9\n\n no end of line"
    path = write(tmp_path / "novel.txt", content, suffix)
    (piece,) = read(open_corpus(path))
    assert piece.content == "\ufeffa\r\nbé\n\n no end of line"
    assert (piece.source, piece.offset, piece.is_last) == (str(path), 0, True)
    assert piece.input_bytes == path.stat().st_size
    assert [piece] == list(pieces_of_text(content.decode(), str(path), piece.input_bytes))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_empty_file_is_an_empty_document(tmp_path, suffix):
    (piece,) = read(open_corpus(write(tmp_path / "empty.txt", "", suffix)))
    assert (piece.content, piece.is_last) == ("", True)


LINES = "".join(f"line {number} of zwölf 🙂🙂 words\r\n" + "\n" * (number % 3) for number in range(60))
TEXTS = {
    "lines": LINES,
    "no final newline": LINES + "end",
    "only line breaks": "\n" * 500,
    "no line breaks": "🙂é漢x" * 100,
    "blank": " \n" * 300,
    "bom": "\ufeff" + "a\n" * 200,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("content", TEXTS.values(), ids=TEXTS)
def test_spans_make_up_the_same_document(tmp_path, small_limits, content, suffix):
    path = write(tmp_path / "a.txt", content, suffix)
    corpus = open_corpus(path)
    for span_bytes in SPAN_BYTES:
        spans = corpus.spans(span_bytes)
        if span_bytes <= 100 and not (suffix and path.stat().st_size <= span_bytes):
            assert len(spans) > 4
        for order in (spans, spans[::-1]):  # backwards, no span can go on where the one before it left off
            items = {span: list(corpus.read(span)) for span in order}
            assert joined([item for span in spans for item in items[span]]) == [content]
        # Whether a stream is gone on with or opened anew, spans hold the same.
        forward = {span: [piece.content for piece in corpus.read(span)] for span in spans}
        assert forward == {span: [piece.content for piece in items[span]] for span in spans}


@given(st.text(alphabet=" \n\raé🙂", max_size=120), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_boundaries_never_cut_a_character(tmp_path_factory, content, span_bytes):
    limits = {"WHOLE_BYTES": 0, "SEARCHED_BYTES": 4, "_CHUNK_BYTES": 3}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in limits.items():
            patch.setattr(text, name, value)
        text._examine_anew.cache_clear()
        path = write(tmp_path_factory.mktemp("cut") / "a.txt", content)
        corpus = open_corpus(path)
        spans = corpus.spans(span_bytes)
        pieces = {span: list(corpus.read(span)) for span in reversed(spans)}
        assert joined([piece for span in spans for piece in pieces[span]]) == [content]
        assert sum(piece.is_last for span in spans for piece in pieces[span]) == 1


def test_spans_are_cut_between_visible_characters_where_possible(tmp_path, small_limits):
    path = write(tmp_path / "a.txt", "word\n\nab\ncd\n" * 40)
    corpus = open_corpus(path)
    spans = corpus.spans(30)
    assert len(spans) > 10
    starts = [next(corpus.read(span)) for span in spans[1:]]
    assert {piece.content[:3] for piece in starts} <= {"ab\n"[:3], "cd\n", "wor"}
    before = [list(corpus.read(span))[-1].content for span in spans[:-1]]
    assert {content[-3:] for content in before} <= {"ab\n", "cd\n"}  # never behind the blank line


def test_a_long_file_comes_in_the_pieces_of_any_document(tmp_path):
    words = random.Random(0).choices(["the", "zwölf", "🙂", "line\n", "end.\n\n"], k=700_000)
    content = " ".join(words)
    assert len(content) > 3 * PIECE_CHARACTERS
    path = write(tmp_path / "long.txt", content)
    pieces = read(open_corpus(path))
    expected = list(pieces_of_text(content, str(path), 0))
    assert [(piece.content, piece.offset, piece.is_last, piece.document_hash) for piece in pieces] == [
        (piece.content, piece.offset, piece.is_last, piece.document_hash) for piece in expected
    ]
    assert max(len(piece.content) for piece in pieces) <= PIECE_CHARACTERS
    assert sum(piece.input_bytes for piece in pieces) == path.stat().st_size


def test_files_up_to_16_mib_are_one_span_and_larger_ones_are_cut(tmp_path):
    line = b"0123456789abcde\n"
    (tmp_path / "a.txt").write_bytes(line * (1 << 20))
    (tmp_path / "b.txt").write_bytes(line * ((1 << 20) + 1))
    corpus = open_corpus(tmp_path)
    assert [span.file for span in corpus.spans(1)].count(0) == 1
    spans = corpus.spans(5 << 20)
    assert [(span.file, span.start) for span in spans] == [(0, 0), *((1, n * (5 << 20)) for n in range(4))]
    assert [span.input_bytes for span in spans] == [16 << 20, *[5 << 20] * 3, (1 << 20) + 16]
    assert documents_of(corpus, 5 << 20) == [(line * (1 << 20)).decode(), (line * ((1 << 20) + 1)).decode()]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_named_file_that_is_not_utf8_is_an_error_with_the_line(tmp_path, suffix):
    path = write(tmp_path / "latin1.txt", b"line one\ncaf\xe9", suffix)
    with pytest.raises(UserError, match=rf"latin1.txt{suffix}:2: not UTF-8 text \(byte 0xe9 at 12\)"):
        read(open_corpus(path))
    path = write(tmp_path / "cut.txt", b"one\ntwo\nthr\xe2\x82", suffix)
    with pytest.raises(UserError, match=rf"cut.txt{suffix}:3: not UTF-8 text \(byte 0xe2 at 11\)"):
        read(open_corpus(path))


def test_in_a_directory_a_file_that_is_not_utf8_is_left_out_once_and_named(tmp_path, small_limits):
    (tmp_path / "a.txt").write_bytes(b"line\n" * 30 + b"caf\xe9" + b"\nline" * 100)
    (tmp_path / "b.txt").write_text("good")
    (tmp_path / "c.txt").write_bytes(b"\x80")
    corpus = open_corpus(tmp_path)
    assert len(corpus.spans(40)) > 10
    for span_bytes in (40, 1 << 20):
        items = read(corpus, span_bytes)
        assert [item for item in items if isinstance(item, LeftOut)] == [
            LeftOut("a.txt", "not UTF-8 text (byte 0xe9 at 153)"),
            LeftOut("c.txt", "not UTF-8 text (byte 0x80 at 0)"),
        ]
        assert joined(items) == ["good"]
    later = [span for span in corpus.spans(40) if span.file == 0][5]
    text._examine_anew.cache_clear()
    assert list(corpus.read(later)) == []  # another process knows it, too


@pytest.mark.parametrize("suffix", COMPRESS)
def test_far_behind_in_a_file_that_was_text_so_far_a_bad_byte_is_an_error(tmp_path, small_limits, suffix):
    write(tmp_path / "a.txt", b"line\n" * 50 + b"caf\xe9" + b"\nline" * 20, suffix)
    corpus = open_corpus(tmp_path)
    for span_bytes in (1 << 20, 40):
        with pytest.raises(UserError, match=r"a.txt.*:51: not UTF-8 text \(byte 0xe9 at 253\)"):
            read(corpus, span_bytes)
    # So does the process that reads only that span.
    for span in corpus.spans(40):
        if span.start <= 240 and span.stop > 280:
            with pytest.raises(UserError, match=":51: not UTF-8"):
                list(corpus.read(span))


def test_a_character_on_the_edge_of_what_is_checked_is_whole(tmp_path, small_limits):
    for before in range(196, 203):
        (tmp_path / "a.txt").write_text("x" * before + "🙂" * 10)
        (document,) = documents_of(open_corpus(tmp_path), 1 << 20)
        assert document == "x" * before + "🙂" * 10


def test_every_cut_of_a_compressed_file_is_an_error(tmp_path):
    content = "".join(f"{number} zwölf\n" for number in range(300))
    for suffix, kind in ((".gz", "gzip"), (".zst", "zst")):
        path = write(tmp_path / "a.txt", content, suffix)
        data = path.read_bytes()
        for length in [0, 1, 5, *range(10, len(data), 37), len(data) - 1]:
            path.write_bytes(data[:length])
            # In one span, and when its length is asked for.
            for span_bytes in (1 << 30, 1):
                with pytest.raises(UserError, match=rf"a.txt{suffix}: damaged {kind} file: .*bytes of content"):
                    _read_unclamped(path, span_bytes)


def _read_unclamped(path, span_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "WHOLE_BYTES", 0)
        read(open_corpus(path), span_bytes)


def test_a_file_cut_short_after_it_was_planned_is_an_error(tmp_path, small_limits):
    path = write(tmp_path / "a.txt", LINES * 5, ".zst")
    corpus = open_corpus(path)
    spans = corpus.spans(100)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="damaged zst file"):
        for span in spans:
            list(corpus.read(span))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_files_of_several_frames_are_read_whole(tmp_path, small_limits, suffix):
    compress = COMPRESS[suffix]
    parts = [LINES, "", "second\n", "🙂" * 50]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"".join(compress(part.encode()) for part in parts))
    for span_bytes in (1 << 30, 100, 7):
        assert documents_of(open_corpus(path), span_bytes) == ["".join(parts)]
    path.write_bytes(path.read_bytes() + b"garbage")
    with pytest.raises(UserError, match="damaged"):
        read(open_corpus(path))


def test_spans_read_in_order_decompress_a_file_once(tmp_path, small_limits, monkeypatch):
    path = write(tmp_path / "a.txt", LINES * 20, ".zst")
    corpus = open_corpus(path)
    spans = corpus.spans(100)
    assert len(spans) > 100
    opened = itertools.count()
    whole = compressed.Content.__init__

    def counting(self, *arguments):
        next(opened)
        whole(self, *arguments)

    monkeypatch.setattr(compressed.Content, "__init__", counting)
    items = [item for span in spans for item in corpus.read(span)]
    assert joined(items) == [LINES * 20]
    assert next(opened) == 2  # the first span's, and one look at the beginning for the later ones


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("step", [2, 3, 7])
def test_spans_shared_out_among_workers_decompress_a_file_once_each(tmp_path, small_limits, monkeypatch, name, step):
    """A worker gets only some of the spans; it reads on to the next of them, and finds what a fresh one would."""
    content = "".join(f'{{"text": "line {n}, {n * 7919 % 10007}"}}\n' for n in range(2000))
    path = write(tmp_path / name, content, ".zst")
    corpus = open_corpus(path)
    spans = corpus.spans(500)
    assert len(spans) > 70

    def without_input_bytes(items):
        return [dataclasses.replace(item, input_bytes=0) for item in items]

    fresh = []
    for span in spans:
        compressed._kept.clear()
        fresh.append(without_input_bytes(corpus.read(span)))
    compressed._kept.clear()
    opened = itertools.count()
    whole = compressed.Content.__init__
    monkeypatch.setattr(compressed.Content, "__init__", lambda self, *more: next(opened) < 0 or whole(self, *more))
    for worker in range(step):
        for span, items in list(zip(spans, fresh, strict=True))[worker::step]:
            assert without_input_bytes(corpus.read(span)) == items
    assert next(opened) <= 2 * step  # a worker's own, and (of text) a look at the beginning


def test_a_stream_of_the_parent_process_is_not_gone_on_with(tmp_path, small_limits, monkeypatch):
    corpus = open_corpus(write(tmp_path / "a.txt", LINES, ".gz"))
    first, second = corpus.spans(100)[:2]
    list(corpus.read(first))
    (kept,) = compressed._kept
    monkeypatch.setattr(compressed.os, "getpid", lambda: kept[0] + 1)
    assert compressed.resume(corpus.files[0], second.start) is None
    assert kept in compressed._kept


def test_a_directory_that_takes_the_place_of_a_file_is_an_error(tmp_path):
    path = write(tmp_path / "a.txt", "a")
    corpus = open_corpus(path)
    (span,) = corpus.spans(100)
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.txt: No such file"):
        list(corpus.read(span))
    path.mkdir()
    with pytest.raises(UserError, match=r"cannot read .*a.txt: Is a directory"):
        list(corpus.read(span))


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_memory_is_bounded(tmp_path, suffix):
    line = "Es war einmal ein König, der hatte zwölf Töchter 🙂.\n" * 20_000
    data, repeats = line.encode(), 300_000_000 // len(line.encode()) + 1
    path = tmp_path / f"big.txt{suffix}"
    with zstd.ZstdFile(path, "w", level=1) if suffix else path.open("wb") as file:
        for _ in range(repeats):
            file.write(data)
    characters, documents, growth = measure(path, 64 << 20)
    assert (characters, documents) == (len(line) * repeats, 1)
    assert growth < 100
