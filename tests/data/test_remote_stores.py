"""Stores behind a URL: made there whole, and copied from there once, with every shard checked."""

import fsspec
import pytest

from latentjax.data.output import OutputDirectory
from latentjax.data.progress import Progress
from latentjax.data.resolve import build_store, local_tasks, open_corpus, resolve_store
from latentjax.errors import UserError
from tests.data.stores import TEXTS, build, content_of, data_config, documents_of, write_json_lines


@pytest.fixture
def memory():
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def data(tmp_path):
    return data_config(write_json_lines(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "cache")


def build_at(url, data):
    corpus = open_corpus(data.path, data)
    build_store(data, corpus, OutputDirectory(url), local_tasks(1), Progress(False))


def test_input_and_output_behind_urls(tmp_path, data, memory):
    local = content_of(build(data, tmp_path / "local").path)
    memory.pipe_file("/bucket/corpus.jsonl", (tmp_path / "corpus.jsonl").read_bytes())
    data.path = "memory://bucket/corpus.jsonl"
    build_at("memory://bucket/store", data)
    remote = {name.removeprefix("/bucket/store/"): memory.cat_file(name) for name in memory.find("/bucket/store")}
    assert remote.keys() == local.keys()
    # The manifest names another path, and its recipe is another.
    differing = {name for name in local if remote[name] != local[name]}
    assert differing == {"manifest.json"}
    build_at("memory://bucket/store", data)  # already there
    data.eval_fraction = 0.3
    with pytest.raises(UserError, match="memory://bucket/store holds a store of another corpus"):
        build_at("memory://bucket/store", data)


def test_a_store_behind_a_url_is_copied_to_the_cache_once(tmp_path, data, memory, monkeypatch):
    build_at("memory://bucket/store", data)
    store = resolve_store("memory://bucket/store", data, progress=False)
    assert store.path.parent == tmp_path / "cache"
    assert sorted(documents_of(store, "train") + documents_of(store, "eval")) == sorted(TEXTS)
    assert store.tokenizer.fingerprint == store.fingerprint
    with monkeypatch.context() as context:
        context.setattr("latentjax.data.resolve._copy", None)  # a second copy would fail
        assert resolve_store("memory://bucket/store", data, progress=False).path == store.path


def test_an_interrupted_copy_goes_on_and_a_damaged_shard_is_refused(tmp_path, data, memory, monkeypatch):
    build_at("memory://bucket/store", data)
    whole = {name: memory.cat_file(name) for name in memory.find("/bucket/store")}
    name = next(name for name in whole if "train-" in name)
    memory.pipe_file(name, whole[name][:-1] + bytes([whole[name][-1] ^ 1]))
    with pytest.raises(UserError, match=r"memory://bucket/store/train-00000\.arrayrecord is damaged: its SHA-256"):
        resolve_store("memory://bucket/store", data, progress=False)
    (place,) = (tmp_path / "cache").iterdir()
    assert not (place / "manifest.json").exists() and not (place / "train-00000.arrayrecord").exists()
    memory.pipe_file(name, whole[name])
    store = resolve_store("memory://bucket/store", data, progress=False)
    store.verify(lambda size: None)
    assert store.path == place


def test_nothing_behind_a_url(data, memory):
    with pytest.raises(UserError, match="memory://bucket/absent"):
        resolve_store("memory://bucket/absent", data, progress=False)
    with pytest.raises(UserError, match="s3fs"):
        resolve_store("s3://bucket/absent", data, progress=False)
