"""The token store: what is written is what is read, and damage is named."""

import hashlib
import json
import pickle

import numpy as np
import pytest

from latentjax.data.store import TokenStore
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.errors import UserError
from tests.data.stores import TEXTS, build, data_config, documents_of, write_json_lines


@pytest.fixture
def data(tmp_path):
    return data_config(write_json_lines(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "cache")


@pytest.fixture
def small(monkeypatch, data):
    """Blocks and shards so small that a few documents fill many."""
    monkeypatch.setattr("latentjax.data.shards.BLOCK_TOKENS", 50)
    monkeypatch.setattr("latentjax.data.resolve.MEGABYTE", 100)
    data.shard_megabytes = 9


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_every_document_is_in_one_split_and_comes_back_in_order(data, tmp_path, small, tokenizer):
    data.tokenizer, data.tokenizer_vocab_size = tokenizer, 290
    store = build(data, tmp_path / "store")
    train, held_out = documents_of(store, "train"), documents_of(store, "eval")
    border = 0.1 * 2**64
    hashes = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") for text in TEXTS]
    assert train == [text for text, value in zip(TEXTS, hashes) if value >= border]
    assert held_out == [text for text, value in zip(TEXTS, hashes) if value < border]
    assert len(held_out) > 1 and len(store.split("train").shards) > 3
    store.verify(lambda size: None)


def test_any_range_reads_as_a_slice(data, tmp_path, small):
    split = build(data, tmp_path / "store").split("train")
    everything = split.read(0, split.num_tokens)
    rng = np.random.default_rng(0)
    ranges = [sorted(rng.integers(0, split.num_tokens + 1, 2)) for _ in range(200)]
    border = split.shards[0].tokens
    for start, end in [*ranges, (split.num_tokens - 1, split.num_tokens), (border - 1, border + 1)]:
        if start < end:
            np.testing.assert_array_equal(split.read(start, end - start), everything[start:end])
    starts = rng.integers(0, split.num_tokens - 200, 50)
    windows = split.read_windows(starts, 200)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(windows, [everything[start : start + 200] for start in starts])
    for start, length in [(-1, 2), (0, split.num_tokens + 1), (split.num_tokens, 1)]:
        with pytest.raises(IndexError):
            split.read(start, length)


def test_a_read_opens_only_the_shards_it_needs(data, tmp_path, small):
    store = build(data, tmp_path / "store")
    split = store.split("train")
    expected = split.read(0, 60)
    for shard in split.shards[1:]:
        (store.path / shard.name).unlink()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(split)).read(0, 60), expected)


def test_the_manifest_says_what_is_in_the_store(data, tmp_path, small):
    store = build(data, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    corpus = manifest["corpus"]
    text_bytes = sum(len(text.encode()) for text in TEXTS)
    assert corpus["path"] == data.path and corpus["readers"] == ["JsonLinesReader"]
    assert (corpus["documents"], corpus["bytes"], corpus["malformed"]) == (len(TEXTS), text_bytes, 0)
    lengths = [len(text.encode()) for text in TEXTS]
    for digits, count in corpus["document_lengths"].items():
        assert count == sum(length.bit_length() == int(digits) for length in lengths)
    assert sum(corpus["document_lengths"].values()) == len(TEXTS)
    assert manifest["tokenizer"] == {
        "kind": "bytes",
        "fingerprint": ByteTokenizer().fingerprint,
        "vocab_size": 257,
        "eod_id": 256,
        "bytes_per_token": text_bytes / (text_bytes + len(TEXTS)),
    }
    assert (manifest["dtype"], manifest["block_tokens"]) == ("uint16", 50)
    for name in ("train", "eval"):
        split = manifest["splits"][name]
        assert sum(shard["tokens"] for shard in split["shards"]) == split["tokens"]
        for shard in split["shards"]:
            content = (store.path / shard["name"]).read_bytes()
            assert len(content) == shard["bytes"]
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert manifest["versions"]["sentencepiece"]
    # Nothing of the making is left.
    shards = [shard.name for shard in store.shards]
    assert sorted(path.name for path in store.path.iterdir()) == sorted([*shards, "manifest.json", "tokenizer"])


def test_vocabularies_beyond_16_bits_are_stored_in_32(data, tmp_path, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode_batch(self, texts, continued=None):
            return [ids + 69_000 for ids in super().encode_batch(texts, continued)]

    monkeypatch.setattr("latentjax.data.resolve.ByteTokenizer", Wide)
    store = build(data, tmp_path / "store")
    assert store.manifest["dtype"] == "uint32"
    assert store.split("train").read(0, 30).max() > 69_000


def change_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def _unfinish(path):
    (path / "manifest.json").rename(path / "plan.json")


def _truncate(path):
    shard = path / "eval-00000.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: (path / "manifest.json").unlink(), "store is no token store: it has no manifest.json"),
        (_unfinish, "store is not finished: give the same `python -m latentjax.prepare` command again"),
        (lambda path: (path / "manifest.json").write_text('{"format'), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not the manifest"),
        (lambda path: (path / "manifest.json").write_text('{"format": "x"}'), "manifest.json is not the manifest"),
        (lambda path: change_manifest(path, version=99), "manifest.json has format version 99.*reads version 2"),
        (lambda path: change_manifest(path, version=None), "manifest.json is not the manifest"),
        (lambda path: change_manifest(path, splits={}), "manifest.json is damaged: it lacks 'train'"),
        (lambda path: change_manifest(path, block_tokens=0), "manifest.json is damaged"),
        (lambda path: change_manifest(path, dtype="float8"), "manifest.json is damaged: unknown dtype 'float8'"),
        (lambda path: (path / "train-00000.arrayrecord").unlink(), "train-00000.arrayrecord is missing"),
        (_truncate, r"eval-00000.arrayrecord is damaged: \d+ bytes instead of"),
    ],
)
def test_a_damaged_store_names_the_file(data, tmp_path, damage, message):
    build(data, tmp_path / "store")
    damage(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "store")


def test_damage_within_a_shard_is_found_when_it_is_read_and_when_verified(data, tmp_path):
    build(data, tmp_path / "store")
    shard = tmp_path / "store" / "train-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 0xFF
    shard.write_bytes(content)
    store = TokenStore(tmp_path / "store")
    with pytest.raises(UserError, match="block 0 of .*train-00000.arrayrecord is damaged: it cannot be read"):
        store.split("train").read(0, 10)
    seen = []
    with pytest.raises(UserError, match=r"1 of 2 shards .* are damaged .*: train-00000\.arrayrecord; restore"):
        store.verify(seen.append)
    assert sum(seen) == sum(shard.bytes for shard in store.shards)


def test_a_tokenizer_of_another_store_is_refused(data, tmp_path):
    store = build(data, tmp_path / "store")
    change_manifest(store.path, tokenizer=store.manifest["tokenizer"] | {"fingerprint": "0" * 64})
    with pytest.raises(UserError, match="tokenizer in .*store is not the one"):
        _ = TokenStore(store.path).tokenizer
