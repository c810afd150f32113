"""JSON lines: which documents, where they stand, and what is said of a bad one."""

import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import documents_of, joined, malformed_in, measure, open_corpus, read

from latentjax.data.readers import json_lines, long_lines
from latentjax.data.readers.base import PIECE_CHARACTERS, Malformed
from latentjax.data.readers.compressed import zstd
from latentjax.errors import UserError

SPAN_BYTES = [1, 7, 23, 100, 1000, 1 << 20]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress, ".zstd": zstd.compress}
TEXTS = ["one\nline", "", "zwölf \u2028\x85 🙂", "\r\n", 'quotes " and \\', "long " * 60, "\ufeff", "last"]


def lines_of(texts, field="text"):
    return [json.dumps({"id": 1, field: text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_line_is_a_document(tmp_path, suffix):
    path = tmp_path / f"corpus.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]("\n\n".join(lines_of(TEXTS, "body")).encode()))
    items = read(open_corpus(path, text_field="body"))
    assert joined(items) == TEXTS
    assert [item.source for item in items] == [f"{path}:{line}" for line in range(1, 2 * len(TEXTS), 2)]
    assert sum(item.input_bytes for item in items) == path.stat().st_size


@pytest.mark.parametrize("name", ["a.ndjson", "a.NDJSON.gz", "a.ndjson.zst", "a.json.gz", "a.json.zst"])
def test_other_names_of_json_lines(tmp_path, name):
    path = tmp_path / name
    suffix = path.suffix if path.suffix in COMPRESS else ""
    path.write_bytes(COMPRESS[suffix]("\n".join(lines_of(TEXTS)).encode()))
    assert documents_of(open_corpus(path)) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n \n\n"])
@pytest.mark.parametrize("last", ["", "\n"])
def test_spans_share_the_lines_whatever_their_size_and_order(tmp_path, suffix, line_end, last):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix]((line_end.join(lines_of(TEXTS * 3)) + last).encode()))
    corpus = open_corpus(path)
    for span_bytes in SPAN_BYTES:
        spans = corpus.spans(span_bytes)
        forward = {span: list(corpus.read(span)) for span in spans}
        backward = {span: list(corpus.read(span)) for span in reversed(spans)}
        assert joined([item for span in spans for item in forward[span]]) == TEXTS * 3
        for span in spans:
            # Where the stream was gone on with, as where it was opened anew: the same documents from the same places.
            assert [(item.content, item.source) for item in forward[span]] == [
                (item.content, item.source) for item in backward[span]
            ]
    assert documents_of(corpus, 1) == TEXTS * 3


@given(st.lists(st.text(alphabet="a é🙂\n", max_size=30), max_size=8), st.integers(1, 80), st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_line_is_lost_or_read_twice(tmp_path_factory, texts, span_bytes, is_last_ended):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(lines_of(texts)) + "\n" * is_last_ended, encoding="utf-8")
    assert documents_of(open_corpus(path), span_bytes) == texts


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n')
    assert documents_of(open_corpus(path)) == ["a", "b"]


BAD_LINES = [
    (b'{"text": "a"', "not a JSON line: .* at column 13"),
    (b'["text"]', "a line must hold a JSON object, not list"),
    (b'{"txt": "a", "id": 3}', "no field 'text'; the line has 'txt', 'id'"),
    (b"{}", "no field 'text'; the line has none"),
    (b'{"text": 5}', "field 'text' is int, not a string"),
    (b'{"text": null}', "field 'text' is NoneType, not a string"),
    (b'{"text": "\xff"}', r"not UTF-8 text \(byte 11 of the line\)"),
    (b'{"text": "\\ud800"}', "field 'text' holds half of a surrogate pair, which is no character"),
    (b"[" * 100_000, "not a JSON line"),
    (b'{"text": ' + b"7" * 5000 + b"}", "not a JSON line that can be read"),
    (b'{"text": [1, -2]}', "field 'text' holds the negative token id -2"),
    (b'{"text": [1, 2.0]}', "field 'text' is a list with float in it, not of whole numbers"),
    (b'{"text": [1, true]}', "field 'text' is a list with bool in it"),
    (b'{"text": [[1]]}', "field 'text' is a list with list in it"),
    (b'{"text": [1, 99999999999999999999]}', "field 'text' holds a number that is no token id"),
]


@pytest.mark.parametrize("line, reason", BAD_LINES)
def test_a_bad_line_is_passed_over_and_named(tmp_path, line, reason):
    for suffix in ("", ".gz"):
        path = tmp_path / f"bad.jsonl{suffix}"
        good = b'{"text": "fine"}\n'
        path.write_bytes(COMPRESS[suffix](good * 50 + b"\n" + line + b"\n" + good * 2))
        for span_bytes in (1 << 30, 100, 7):
            items = read(open_corpus(path), span_bytes)
            assert joined(items) == ["fine"] * 52
            (malformed,) = malformed_in(items)
            assert malformed.source == f"{path}:52"
            assert re.match(reason, malformed.reason), malformed.reason


def test_lines_are_numbered_from_the_beginning_of_the_file_in_every_span(tmp_path):
    path = tmp_path / "a.jsonl"
    bad = {number for number in range(1, 2001) if number % 7 == 0}
    lines = ["{" if number in bad else json.dumps({"text": "x" * (number % 30)}) for number in range(1, 2001)]
    path.write_text("\n".join(lines))
    corpus = open_corpus(path)
    expected = [f"{path}:{number}" for number in sorted(bad)]
    for span_bytes in (50, 1000, 1 << 20):
        spans = corpus.spans(span_bytes)
        forward = [item for span in spans for item in corpus.read(span)]
        assert [item.source for item in malformed_in(forward)] == expected
        backward = [malformed_in(list(corpus.read(span))) for span in reversed(spans)]
        assert [item.source for items in reversed(backward) for item in items] == expected


def test_the_source_of_a_good_document_finds_its_line(tmp_path):
    path = tmp_path / "a.jsonl"
    data = "\n".join(lines_of(TEXTS * 5)).encode()
    path.write_bytes(data)
    for piece in read(open_corpus(path), 200):
        place = piece.source.removeprefix(f"{path}:")
        line = data[int(place[1:]) :].split(b"\n")[0] if "@" in place else data.split(b"\n")[int(place) - 1]
        assert json.loads(line)["text"] == piece.content


def test_lists_of_integers_are_token_ids(tmp_path):
    path = tmp_path / "ids.jsonl"
    rows = [[1, 2, 3], [], [70_000, 0], list(range(20_000))]
    path.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    for packed in (False, True):
        pieces = read(open_corpus(path, text_field="input_ids", packed_rows=packed), 10)
        assert [piece.content.tolist() for piece in pieces] == rows
        assert all(piece.content.dtype == np.int64 for piece in pieces)
        assert [piece.is_last for piece in pieces] == [not packed] * 4
    assert documents_of(open_corpus(path, text_field="input_ids"), 10) == rows


def test_a_truncated_file_is_an_error_in_every_way_of_reading(tmp_path):
    data = "".join(f'{{"text": "fine {number}"}}\n' for number in range(1000)).encode()
    for suffix, kind in ((".gz", "gzip"), (".zst", "zst")):
        path = tmp_path / f"cut.jsonl{suffix}"
        path.write_bytes(COMPRESS[suffix](data))
        corpus = open_corpus(path)
        spans = corpus.spans(500)
        for cut in (COMPRESS[suffix](data)[:-20], b"no such thing", b""):
            path.write_bytes(cut)
            for action in (
                lambda: read(open_corpus(path)),
                lambda: open_corpus(path).spans(0 if not path.stat().st_size else 1) and read(open_corpus(path), 1),
                lambda: [list(corpus.read(span)) for span in spans],
                lambda: list(corpus.read(spans[-1])),
            ):
                with pytest.raises(UserError, match=rf"cut.jsonl{suffix}: damaged {kind} file: "):
                    action()


# -- lines that are too long to be held in memory


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", 40)
    monkeypatch.setattr(json_lines, "_CHUNK_BYTES", 7)


def from_long_line(line: bytes, field="text", chunk_bytes=5):
    chunks = (line[start : start + chunk_bytes] for start in range(0, len(line), chunk_bytes))
    return joined(list(long_lines.pieces_of_long_line(chunks, field, "a.jsonl:1", 0, lambda: 0, False)))


strings = st.text(max_size=20) | st.text(alphabet='\\"\n\t/u\ud83dd🙂é', max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3),
    max_leaves=10,
)


@given(
    st.lists(st.tuples(strings, values), max_size=4, unique_by=lambda item: item[0]),
    st.text(max_size=80) | st.lists(st.integers(0, 2**40), max_size=30),
    st.integers(0, 4),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 30),
)
@example([], "🙂" * 9, 0, True, None, 3)
@settings(max_examples=400, deadline=None)
def test_a_long_line_holds_what_json_loads_finds(others, document, place, ascii_only, indent, chunk_bytes):
    others = [(key, value) for key, value in others if key != "text"]
    record = dict([*others[:place], ("text", document), *others[place:]])
    line = json.dumps(record, ensure_ascii=True if _has_surrogates(record) else ascii_only, indent=indent).encode()
    assert from_long_line(line, chunk_bytes=chunk_bytes) == [json.loads(line)["text"]]


def _has_surrogates(record) -> bool:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_a_long_line_is_refused_where_json_loads_refuses_it(data):
    record = {"a": [1, {"b": [True, -1.5e3]}, "x"], "text": 'zw\u00f6lf "quoted" \U0001f642', "c": {"d": None}}
    line = bytearray(json.dumps(record, ensure_ascii=data.draw(st.booleans())).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(line) - 1))
        line[place : place + data.draw(st.integers(0, 3))] = [data.draw(st.sampled_from(b'"\\{}[],:0-eEu \x01\xff'))]
    try:
        json.loads(bytes(line).decode(), object_pairs_hook=_without_duplicates)
        expected = json_lines._value(bytes(line), "text")
    except (ValueError, json_lines.BadDocument):
        expected = None
    try:
        (found,) = from_long_line(bytes(line), chunk_bytes=data.draw(st.integers(1, 20)))
    except json_lines.BadDocument:
        found = None
    assert found == (expected.tolist() if isinstance(expected, np.ndarray) else expected)


def _without_duplicates(pairs):
    if [key for key, _ in pairs].count("text") > 1:
        raise ValueError("twice")
    return dict(pairs)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_long_lines_among_others(tmp_path, small_chunks, suffix):
    texts = ["a", "b" * 200, "", "🙂\n\\" * 50, "c"]
    lines = [*lines_of(texts), '{"text": [' + "7, " * 100 + "8]}"]
    path = tmp_path / f"a.jsonl{suffix}"
    for line_end in ("\n", "\r\n", "\n\n"):
        data = line_end.join(lines).encode()
        path.write_bytes(COMPRESS[suffix](data))
        for span_bytes in (1 << 20, 100, 7):
            items = read(open_corpus(path), span_bytes)
            assert joined(items) == [*texts, [7] * 100 + [8]]
    assert sum(item.input_bytes for item in read(open_corpus(path))) == path.stat().st_size


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"other": "' + "x" * 100 + '"}', "no field 'text'; the line has 'other'"),
        ('["' + "x" * 100 + '"]', "a line must hold a JSON object, not list"),
        ('{"text": null, "other": "' + "x" * 100 + '"}', "field 'text' is not a string"),
        ('{"text": "' + "x" * 100 + '"', "not a JSON line: expected ',' or '}' at character 113"),
        ('{"text": "' + "x" * 100 + '"}}', "not a JSON line: extra data at character 113"),
        ('{"text": "' + "x" * 100, "not a JSON line: unterminated string at character 111"),
        ('{"text": "' + "x" * 100 + '\\ud83d"}', "field 'text' holds half of a surrogate pair, which is no character"),
        ('{"text": "a", "text": "' + "x" * 100 + '"}', "field 'text' stands twice in a long line"),
        ('{"text": [' + "1, " * 100 + "-1]}", "field 'text' holds the negative token id -1"),
        ('{"a": ' + "[" * 2000 + "]" * 2000 + ', "text": ""}', "not a JSON line: nested too deep at character 1008"),
    ],
)
def test_a_bad_long_line_is_passed_over_if_nothing_of_it_was_taken_up(tmp_path, small_chunks, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n{{"text": "b"}}\n')
    items = read(open_corpus(path))
    assert joined(items) == ["a", "b"]
    assert malformed_in(items) == [Malformed(f"{path}:2", reason)]


def test_a_fault_behind_pieces_that_were_taken_up_is_an_error(tmp_path, small_chunks, monkeypatch):
    monkeypatch.setattr(json_lines, "_CHUNK_BYTES", 1 << 16)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "' + "word " * PIECE_CHARACTERS + "\n")
    corpus = open_corpus(path)
    pieces = corpus.read(corpus.spans(1 << 30)[0])
    assert [next(pieces).content[:5] for _ in range(3)] == ["a", "word ", " word"]
    with pytest.raises(UserError, match=r"a.jsonl:2: not a JSON line: unterminated string.*taken up already"):
        list(pieces)


def test_a_line_at_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    for more in range(-2, 4):
        line = '{"text": "' + "x" * 50 + '"}'
        monkeypatch.setattr(json_lines, "LONG_LINE_BYTES", len(line) + more)
        for text in (f"{line}\n{line}\n", f"{line}\n{line}"):
            path.write_text(text)
            assert documents_of(open_corpus(path)) == ["x" * 50] * 2


@pytest.mark.parametrize("ascii_only", [False, True])
def test_memory_is_bounded_with_one_line_of_200_megabytes(tmp_path, ascii_only):
    text = "Der König hatte zwölf Töchter.\n" * 30_000
    inner = json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode()
    repeats = 200_000_000 // len(inner)
    path = tmp_path / "long.jsonl"
    with path.open("wb") as file:
        file.write(b'{"id": 7, "text": "')
        for _ in range(repeats):
            file.write(inner)
        file.write(b'", "meta": {"a": [1, 2]}}\n')
    characters, documents, growth = measure(path, 1 << 30)
    assert (characters, documents) == (len(text) * repeats, 1)
    assert growth < 150
