"""Files behind URLs, by way of fsspec's file system in memory."""

import json
import subprocess
import sys

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import REPOSITORY, documents_of, joined, open_corpus, read

from latentjax.data import remote
from latentjax.data.readers import text
from latentjax.data.readers.compressed import zstd
from latentjax.errors import UserError


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def pile(memory):
    for name in ("b.txt", "a.txt", "sub/c.txt", "sub/deep/d.txt", "sub/d.md"):
        memory.pipe(f"/pile/{name}", name.encode())
    return "memory://pile"


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_what_is_a_url():
    for path in ("gs://b/x", "memory://x", "hf://datasets/u/n", "file:///x", "zip://a.txt::s3://b/c.zip"):
        assert remote.is_remote(path)
    for path in ("/a/b", "a:b", "tfds:lm1b/train", "~/x", "a/b://c"):
        assert not remote.is_remote(path)


def test_a_remote_directory_is_listed_and_read_as_a_local_one(pile):
    def names(path, include=("**/*",), exclude=()):
        corpus = open_corpus(path, include, exclude)
        assert [file.path for file in corpus.files] == [
            f"{path.split('*')[0].rstrip('/')}/{file.name}" for file in corpus.files
        ]
        return [file.name for file in corpus.files]

    assert names(pile, ["**/*.txt"]) == ["a.txt", "b.txt", "sub/c.txt", "sub/deep/d.txt"]
    assert names(f"{pile}/", ["**/*.txt"], ["**/deep"]) == ["a.txt", "b.txt", "sub/c.txt"]
    assert names(f"{pile}/*.txt") == ["a.txt", "b.txt"]
    assert names(f"{pile}/**/d.*") == ["sub/d.md", "sub/deep/d.txt"]
    assert documents_of(open_corpus(pile, ["*.txt"])) == ["a.txt", "b.txt"]
    (file,) = open_corpus(f"{pile}/sub/c.txt").files
    assert (file.name, file.path, file.size, file.named) == ("c.txt", f"{pile}/sub/c.txt", 9, True)


def test_directories_that_patterns_rule_out_are_not_listed(pile, monkeypatch):
    listed = []
    filesystem = type(fsspec.filesystem("memory"))
    ls = filesystem.ls

    def recording(self, path, *arguments, **options):
        listed.append(path)
        return ls(self, path, *arguments, **options)

    monkeypatch.setattr(filesystem, "ls", recording)
    open_corpus(f"{pile}/*.txt")
    open_corpus(pile, exclude=["sub"])
    assert set(listed) == {"/pile"}
    open_corpus(f"{pile}/*/*.txt")
    assert set(listed) == {"/pile", "/pile/sub"}


def test_the_stamp_changes_with_the_file(pile, memory):
    before = open_corpus(pile).files
    assert open_corpus(pile).files == before
    memory.pipe("/pile/a.txt", b"other")
    after = open_corpus(pile).files
    assert [old.stamp == new.stamp for old, new in zip(before, after)] == [False, True, True, True, True]


@pytest.mark.parametrize(
    "info, stamp",
    [
        ({"generation": "17", "etag": "x", "mtime": 3}, "17"),
        ({"ETag": '"abc"', "LastModified": "today"}, '"abc"'),
        ({"etag": None, "mtime": 3.5}, "3.5"),
        ({}, ""),
    ],
)
def test_the_stamp_is_the_best_that_a_store_gives(pile, monkeypatch, info, stamp):
    monkeypatch.setattr(
        type(fsspec.filesystem("memory")), "info", lambda self, path: {"name": path, "type": "file", "size": 5, **info}
    )
    assert remote.size_and_stamp(f"{pile}/a.txt") == (5, stamp)


def test_every_format_is_read_from_afar_span_by_span(memory, monkeypatch):
    monkeypatch.setattr(text, "WHOLE_BYTES", 0)
    monkeypatch.setattr(text, "SEARCHED_BYTES", 20)
    texts = [f"zwölf {number}\n" for number in range(200)]
    memory.pipe("/all/a.jsonl", lines(texts))
    memory.pipe("/all/b.jsonl.zst", zstd.compress(lines(texts)))
    memory.pipe("/all/c.txt", "".join(texts).encode())
    table, sink = pa.table({"text": texts}), pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=30)
    memory.pipe("/all/d.parquet", sink.getvalue().to_pybytes())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    memory.pipe("/all/e.arrow", sink.getvalue().to_pybytes())
    corpus = open_corpus("memory://all")
    for span_bytes in (100, 3000, 1 << 20):
        items = read(corpus, span_bytes)
        assert joined(items) == [*texts, *texts, "".join(texts), *texts, *texts]
    assert len(corpus.spans(100)) > 80


def test_a_saved_data_set_is_read_from_afar(memory):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, pa.schema({"text": "str"})) as writer:
        writer.write_table(pa.table({"text": ["a", "b"]}))
    for name in ("2.arrow", "10.arrow"):
        memory.pipe(f"/set/{name}", sink.getvalue().to_pybytes())
    memory.pipe("/set/state.json", json.dumps({"_data_files": [{"filename": f"{n}.arrow"} for n in (2, 10)]}).encode())
    corpus = open_corpus("memory://set")
    assert [file.name for file in corpus.files] == ["2.arrow", "10.arrow"]
    assert documents_of(corpus) == ["a", "b"] * 2
    memory.pipe("/sets/dataset_dict.json", b'{"splits": ["train"]}')
    with pytest.raises(UserError, match="splits train: give one of them, such as memory://sets/train"):
        open_corpus("memory://sets")


def test_local_urls_and_archives(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (file,) = open_corpus(f"file://{tmp_path}/a.txt").files
    assert (file.name, file.size) == ("a.txt", 1)
    assert documents_of(open_corpus(f"file://{tmp_path}/*.txt")) == ["a"]
    assert [file.name for file in open_corpus(f"file://{tmp_path}").files] == ["a.txt"]


def test_what_is_not_there_is_said_with_its_path(pile):
    with pytest.raises(UserError, match="no corpus at memory://pile/absent: there is no such file or directory"):
        open_corpus(f"{pile}/absent")
    with pytest.raises(UserError, match=r"no file matches memory://pile/\*.csv"):
        open_corpus(f"{pile}/*.csv")
    with pytest.raises(UserError, match=r"no file under memory://pile matches include \*.csv"):
        open_corpus(pile, ["*.csv"])
    with pytest.raises(UserError, match="cannot read memory://pile/absent: no such file"):
        remote.size_and_stamp(f"{pile}/absent")
    with pytest.raises(UserError, match=r"cannot read memory://pile/absent"):
        remote.open_binary(f"{pile}/absent")
    with pytest.raises(UserError, match=r"cannot read nonsense://a: .*nonsense"):
        open_corpus("nonsense://a")


class Refused(Exception):
    """What no library of ours has heard of."""


def test_whatever_a_store_raises_becomes_an_error_with_the_path(pile, monkeypatch):
    filesystem = type(fsspec.filesystem("memory"))
    corpus = open_corpus(pile, ["a.txt"])
    (span,) = corpus.spans(100)

    def refuse(*arguments, **options):
        raise Refused("403: quota")

    for what, action in (
        ("open", lambda: list(corpus.read(span))),
        ("info", lambda: open_corpus(pile)),
        ("ls", lambda: open_corpus(f"{pile}/*.txt")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(filesystem, what, refuse)
            with pytest.raises(UserError, match=r"cannot read memory://pile.*: Refused: 403: quota"):
                action()
    handle = fsspec.filesystem("memory").open("/pile/a.txt")
    with monkeypatch.context() as patch:
        patch.setattr(type(handle), "read", refuse)
        with pytest.raises(UserError, match=r"cannot read memory://pile/a.txt: Refused: 403: quota"):
            list(corpus.read(span))


@pytest.mark.parametrize("scheme, package", [("gs", "gcsfs"), ("s3", "s3fs"), ("hf", "huggingface_hub")])
def test_a_missing_package_is_named(scheme, package, monkeypatch):
    known = sys.modules["fsspec.registry"]._registry
    monkeypatch.delitem(known, scheme, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError) as caught:
        open_corpus(f"{scheme}://bucket/part.jsonl")
    assert str(caught.value) == f"reading {scheme}:// paths needs the package {package}: pip install {package}"


def test_without_fsspec_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(UserError, match="reading gs:// paths needs the package fsspec: pip install fsspec"):
        open_corpus("gs://bucket/part.jsonl")


def test_local_corpora_do_not_need_fsspec(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(["a"]))
    program = (
        "import sys; from latentjax.data.corpus import Corpus; from latentjax.data.readers.base import ReaderOptions;"
        "sys.modules['fsspec'] = None;"  # whoever imports it now fails
        "corpus = Corpus(sys.argv[1], ['**/*'], [], ReaderOptions('text', False));"
        "print(*[piece.content for span in corpus.spans(1) for piece in corpus.read(span)])"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert run.stdout == "a\n", run.stderr
