"""A corpus: which files, in which order, read by which reader."""

import gzip
import json
import os
import pickle
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import documents_of, joined, open_corpus, read

from latentjax.data.readers.base import CorpusFile, LeftOut, ReaderOptions
from latentjax.data.readers.compressed import zstd
from latentjax.data.readers.formats import reader_for
from latentjax.errors import UserError


@pytest.fixture
def tree(tmp_path):
    names = ["b.py", "a/z.py", "a/b/c.py", "a.py", "a/notes.txt", "skip/x.py", "deep/skip/y.py", "B.py", "x.jsonl"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) if name.endswith("jsonl") else name)
    return tmp_path


def test_a_directory_is_read_in_order_of_names_by_its_patterns(tree):
    def texts(include, exclude=()):
        corpus = open_corpus(tree, include, exclude)
        documents = documents_of(corpus)
        assert [file.name for file in corpus.files] == documents
        return documents

    assert texts(["**/*.py"], ["**/skip"]) == ["B.py", "a.py", "a/b/c.py", "a/z.py", "b.py"]
    assert texts(["*.py"]) == ["B.py", "a.py", "b.py"]
    assert texts(["a/*", "x.jsonl"]) == ["a/notes.txt", "a/z.py", "x.jsonl"]
    assert texts(["**/*.py"], ["skip", "a/**", "[a-b].py"]) == ["B.py", "deep/skip/y.py"]
    assert texts(["**/[!a-b].py", "**/?.txt"]) == ["B.py", "a/b/c.py", "a/z.py", "deep/skip/y.py", "skip/x.py"]
    assert texts(["**"], ["**/*.py"]) == ["a/notes.txt", "x.jsonl"]


def test_a_path_with_wildcards_stands_for_files(tree, monkeypatch):
    def names(pattern, exclude=()):
        corpus = open_corpus(pattern, include=["nothing"], exclude=exclude)
        assert not any(file.named for file in corpus.files)
        assert all(os.path.samefile(file.path, tree / file.path) for file in corpus.files)
        return [os.path.relpath(file.path, tree) for file in corpus.files]

    assert names(f"{tree}/**/*.py") == ["B.py", "a.py", "a/b/c.py", "a/z.py", "b.py", "deep/skip/y.py", "skip/x.py"]
    assert names(f"{tree}/**/*.py", ["**/skip", "a"]) == ["B.py", "a.py", "b.py"]
    assert names(f"{tree}/a/*") == ["a/notes.txt", "a/z.py"]
    assert names(f"{tree}/*/*.py") == ["a/z.py", "skip/x.py"]
    assert names(f"{tree}/[ab].??") == ["a.py", "b.py"]
    assert [file.name for file in open_corpus(f"{tree}/a/**/*.py").files] == ["b/c.py", "z.py"]
    monkeypatch.chdir(tree)
    assert names("*.py") == ["B.py", "a.py", "b.py"]
    assert names("a/b/*") == ["a/b/c.py"]
    (tree / "odd[ab]").mkdir()
    monkeypatch.chdir(tree / "odd[ab]")  # what the user did not write is no pattern
    (tree / "odd[ab]" / "f.py").write_text("f")
    assert names("*.py") == ["odd[ab]/f.py"]


def test_a_path_that_exists_is_no_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text("odd")
    (tmp_path / "a1.txt").write_text("plain")
    assert documents_of(open_corpus(tmp_path / "a[1].txt")) == ["odd"]
    assert documents_of(open_corpus(f"{tmp_path}/a?.txt")) == ["plain"]


def test_every_file_is_read_by_its_own_format(tmp_path):
    def lines(*texts):
        return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()

    (tmp_path / "a.jsonl").write_bytes(lines("1", "2"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines("3", "4")))
    (tmp_path / "c.JSONL.ZST").write_bytes(zstd.compress(lines("5", "6")))
    (tmp_path / "d.json").write_text('{"text": "7"}')
    pq.write_table(pa.table({"text": ["8", "9"]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt.zst").write_bytes(zstd.compress(b"10"))
    (tmp_path / "g").write_bytes(b"\xff")
    (tmp_path / "h.txt").write_text("11")
    with pa.OSFile(str(tmp_path / "i.arrow"), "w") as sink, pa.ipc.new_stream(sink, pa.schema({"text": "str"})) as file:
        file.write_table(pa.table({"text": ["12", "13"]}))
    expected = ["1", "2", "3", "4", "5", "6", '{"text": "7"}', *map(str, range(8, 14))]
    corpus = open_corpus(tmp_path)
    for span_bytes in (1, 20, 1 << 20):
        items = read(corpus, span_bytes)
        assert joined(items) == expected
        assert [item for item in items if isinstance(item, LeftOut)] == [
            LeftOut("g", "not UTF-8 text (byte 0xff at 0)")
        ]


@pytest.mark.parametrize(
    "path, reader",
    [
        ("a.jsonl", "JsonLinesReader"),
        ("a.ndjson.zstd", "JsonLinesReader"),
        ("c4-train.00000-of-01024.json.gz", "JsonLinesReader"),
        ("a.json", "TextReader"),
        ("a.txt.gz", "TextReader"),
        ("jsonl", "TextReader"),
        ("gs://bucket/part.PARQUET", "ParquetReader"),
        ("part.parquet.gz", "TextReader"),
        ("a.arrow", "ArrowReader"),
        ("tfds:lm1b/train", "TfdsReader"),
    ],
)
def test_the_name_says_the_format(path, reader):
    options = ReaderOptions("body", True)
    found = reader_for(CorpusFile(path, path, 0, "", False), options)
    assert (type(found).__name__, found.options) == (reader, options)


def test_a_package_that_a_format_needs_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[-1] in ("parquet", "columns")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"reading /a.parquet needs the package pyarrow: pip install pyarrow"):
        reader_for(CorpusFile("a.parquet", "/a.parquet", 0, "", True), ReaderOptions("text", False))


def test_spans_number_the_files_and_can_be_read_anywhere(tree):
    corpus = open_corpus(tree, ["**/*.py", "*.jsonl"])
    assert [span.file for span in corpus.spans(1)][: len(corpus.files) - 1] == list(range(7))
    other = pickle.loads(pickle.dumps(corpus))
    assert other.files == corpus.files
    for span in reversed(corpus.spans(10)):
        assert list(other.read(span)) == list(corpus.read(span))
    assert len(pickle.dumps(corpus)) < 3000
    assert corpus.plan(7, 10) == [span for span in corpus.spans(10) if span.file == 7]
    assert len(corpus.plan(7, 10)) == 2


def test_sizes_and_stamps_tell_changes(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("twelve bytes")
    os.utime(path, ns=(5, 1_700_000_000_123_456_789))
    corpus = open_corpus(path)
    assert corpus.path == str(path)
    assert corpus.files == [CorpusFile("a.txt", str(path), 12, "1700000000123456789", named=True)]
    assert corpus.total_bytes == 12
    (tmp_path / "b.txt").write_text("four")
    corpus = open_corpus(tmp_path)
    assert corpus.files[0] == CorpusFile("a.txt", str(path), 12, "1700000000123456789", named=False)
    assert corpus.total_bytes == 16


def test_relative_paths_and_the_home_directory(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in ("corpus", "./corpus/", "~/corpus", "corpus/../corpus"):
        corpus = open_corpus(path)
        assert corpus.path == f"{tmp_path}/corpus"
        assert corpus.files[0].path == f"{tmp_path}/corpus/a.txt"
    assert open_corpus("~/cor*/*.txt").files[0].path == f"{tmp_path}/corpus/a.txt"


def test_links_to_files_are_read_and_links_to_directories_are_not_entered(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere.txt").write_text("far")
    (tmp_path / "corpus/link.txt").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "corpus/circle").symlink_to(tmp_path / "corpus")
    (tmp_path / "corpus/broken.txt").symlink_to(tmp_path / "absent")
    (tmp_path / "corpus/itself").symlink_to(tmp_path / "corpus/itself")
    corpus = open_corpus(tmp_path / "corpus")
    assert [(file.name, file.size) for file in corpus.files] == [("link.txt", 3)]
    (tmp_path / "entrance").symlink_to(tmp_path / "corpus")
    assert documents_of(open_corpus(tmp_path / "entrance")) == ["far"]


def test_nothing_there_and_nothing_that_matches(tmp_path):
    with pytest.raises(UserError, match="no corpus at .*absent: there is no such file or directory"):
        open_corpus(tmp_path / "absent")
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match="no corpus at .*a.md/b"):
        open_corpus(tmp_path / "a.md" / "b")
    with pytest.raises(UserError, match=r"no file under .* matches include \*\*/\*.txt without exclude b"):
        open_corpus(tmp_path, ["**/*.txt"], ["b"])
    for pattern in ("*.txt", "absent/*.md", "**/*.txt"):
        with pytest.raises(UserError, match=r"no file matches .*: there is none below /"):
            open_corpus(f"{tmp_path}/{pattern}")
    with pytest.raises(UserError, match=r"no file matches .*/\*.md without exclude a.\*: there is none"):
        open_corpus(f"{tmp_path}/*.md", exclude=["a.*"])


def test_a_bad_pattern_is_named(tmp_path):
    (tmp_path / "a.md").write_text("a")
    with pytest.raises(UserError, match=r"not a glob pattern among \[z-a\]"):
        open_corpus(tmp_path, ["[z-a]"])
    with pytest.raises(UserError, match="not a glob pattern among"):
        open_corpus(f"{tmp_path}/[z-a]*")


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refusing(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refusing)  # root, as which tests may run, may read everything
    with pytest.raises(UserError, match=r"cannot read the directory .*/closed: Permission denied"):
        open_corpus(tmp_path)
    assert documents_of(open_corpus(tmp_path, exclude=["closed"])) == ["a"]
