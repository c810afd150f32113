"""Corpus readers: which documents, in which order, and what is said about a bad one."""

import gzip
import json

import pytest

from latentjax.data.readers import Corpus
from latentjax.errors import UserError


def read(path, include=("**/*",), exclude=(), text_field="text"):
    return list(Corpus(path, include, exclude, text_field).documents())


def test_a_text_file_is_one_document_exactly_as_it_is(tmp_path):
    path = tmp_path / "novel"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb\xc3\xa9\n\n no end of line")
    (document,) = read(path)
    assert document.text == "\ufeffa\r\nbé\n\n no end of line"
    assert document.source == str(path)
    assert document.file_bytes == path.stat().st_size


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_json_line_is_a_document(tmp_path, suffix):
    path = tmp_path / f"corpus{suffix}"
    texts = ["one\nline", "", "zwölf \u2028 🙂", "last"]
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]
    data = "\n\n".join(lines).encode()  # blank lines between, no line break at the end
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    documents = read(path, text_field="body")
    assert [document.text for document in documents] == texts
    assert [document.source for document in documents] == [f"{path}:{line}" for line in (1, 3, 5, 7)]
    assert sum(document.file_bytes for document in documents) == path.stat().st_size


def test_a_directory_is_read_in_order_of_names_by_its_patterns(tmp_path):
    names = ["b.py", "a/z.py", "a/b/c.py", "a.py", "a/notes.txt", "skip/x.py", "deep/skip/y.py", "B.py", "x.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)

    def texts(include, exclude=()):
        return [document.text for document in read(tmp_path, include, exclude)]

    assert texts(["**/*.py"], ["**/skip"]) == ["B.py", "a.py", "a/b/c.py", "a/z.py", "b.py"]
    assert texts(["*.py"]) == ["B.py", "a.py", "b.py"]
    assert texts(["a/*", "x.jsonl"]) == ["a/notes.txt", "a/z.py", "x.jsonl"]
    assert texts(["**/*.py"], ["skip", "a/**", "[a-b].py"]) == ["B.py", "deep/skip/y.py"]
    assert texts(["**/[!a-b].py", "**/?.txt"]) == ["B.py", "a/b/c.py", "a/z.py", "deep/skip/y.py", "skip/x.py"]
    assert texts(["**"], ["**/*.py"]) == ["a/notes.txt", "x.jsonl"]


def test_a_directory_leaves_out_text_that_is_not_utf8_and_says_so(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    corpus = Corpus(tmp_path, ["**/*.txt"], [], "text")
    for _ in range(2):  # counted anew at every reading
        assert [document.text for document in corpus.documents()] == ["good"]
        assert corpus.skipped == ["latin1.txt"]


def test_a_single_file_that_is_not_utf8_is_an_error(tmp_path):
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"line one\ncaf\xe9")
    with pytest.raises(UserError, match=r"latin1.txt:2: not UTF-8 text \(byte 0xe9 at 12\)"):
        read(path)


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', r"bad.jsonl:2: not a JSON line: .* at column"),
        (b'["text"]', r"bad.jsonl:2: a line must hold a JSON object, not list"),
        (b'{"txt": "a", "id": 3}', r"bad.jsonl:2: no field 'text'; the line has 'txt', 'id'"),
        (b'{"text": 5}', r"bad.jsonl:2: field 'text' is int, not a string"),
        (b'{"text": null}', r"bad.jsonl:2: field 'text' is NoneType, not a string"),
        (b'{"text": "\xff"}', r"bad.jsonl:2: not UTF-8 text"),
        (b'{"text": "\\ud800"}', r"bad.jsonl:2: .*surrogate"),
        (b"[" * 100_000, r"bad.jsonl:2: not a JSON line"),
        (b'{"text": ' + b"7" * 5000 + b"}", r"bad.jsonl:2: not a JSON line"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        read(path)
    # Among other files it is no better: a JSON-lines file is never left out quietly.
    with pytest.raises(UserError, match=message):
        read(tmp_path)


def test_a_truncated_gzip_file_is_named(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "fine"}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="cut.jsonl.gz: damaged gzip file"):
        read(path)
    path.write_bytes(b"no gzip at all")
    with pytest.raises(UserError, match="cut.jsonl.gz: damaged gzip file"):
        read(path)


def test_nothing_there_and_nothing_that_matches(tmp_path):
    with pytest.raises(UserError, match="no corpus at .*absent"):
        read(tmp_path / "absent")
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match=r"no file under .* matches include \*\*/\*.txt without exclude b"):
        read(tmp_path, ["**/*.txt"], ["b"])
    with pytest.raises(UserError, match="glob pattern"):
        read(tmp_path, ["[z-a]"])


def test_a_corpus_without_text_is_empty(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"is empty: 2 files, no text in them \(1 skipped: not UTF-8\)"):
        read(tmp_path)
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "c.jsonl")
