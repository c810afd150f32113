"""The token store: what is written is what is read, whole or not at all, and damage is named."""

import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from latentjax.config import default
from latentjax.data import store_writer
from latentjax.data.progress import Progress
from latentjax.data.resolve import build_store, open_corpus, resolve_store
from latentjax.data.store import TokenStore
from latentjax.data.store_writer import assign_splits
from latentjax.data.tokenization import EncodedDocument
from latentjax.data.tokenizers import ByteTokenizer
from latentjax.errors import UserError

TEXTS = ["", "no line end", "zwölf 日本 \u2581 🙂\n", "  \t spaces \n\n", "", "twice", "twice"] + [
    f"document {n}\n" + "text " * n for n in range(60)
]


@pytest.fixture
def data(tmp_path):
    """A config of a JSON-lines corpus of TEXTS."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    data = default().data
    data.path, data.tokenizer, data.store_cache = str(corpus), "bytes", str(tmp_path / "cache")
    data.eval_fraction = 0.1
    return data


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and shards so small that a few documents fill many."""
    monkeypatch.setattr(store_writer, "BLOCK_TOKENS", 50)
    monkeypatch.setattr(store_writer, "BLOCKS_PER_SHARD", 7)


def build(data, output, num_workers=1) -> TokenStore:
    return build_store(data, open_corpus(data), output, num_workers=num_workers, progress=Progress(False))


def documents_of(store, name) -> list[str]:
    split = store.split(name)
    tokens = split.read(0, split.num_tokens)
    assert tokens.dtype == np.int32
    ends = np.flatnonzero(tokens == store.eod_id)
    assert len(ends) == split.num_documents and ends[-1] == len(tokens) - 1
    pieces = np.split(tokens, ends + 1)[:-1]
    texts = [store.tokenizer.decode_bytes(piece[:-1]).decode() for piece in pieces]
    assert split.num_bytes == sum(len(text.encode()) for text in texts)
    return texts


@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_every_document_is_in_one_split_and_comes_back(data, tmp_path, small_blocks, tokenizer):
    data.tokenizer, data.tokenizer_vocab_size = tokenizer, 290
    store = build(data, tmp_path / "store")
    train, held_out = documents_of(store, "train"), documents_of(store, "eval")
    assert sorted(train + held_out) == sorted(TEXTS)
    border = 0.1 * 2**64
    for text in TEXTS:
        text_hash = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        assert text in (held_out if text_hash < border else train)
    # Nothing is held back any more once both splits have a document.
    first = min(TEXTS.index(text) for text in held_out)
    later = [text for text in TEXTS[first + 1 :] if text in train]
    assert len(later) > 30 and train[-len(later) :] == later
    assert held_out == [text for text in TEXTS if text in held_out]
    assert len(store.split("train").shards) > 3
    store.verify()


def test_any_range_reads_as_a_slice(data, tmp_path, small_blocks):
    split = build(data, tmp_path / "store").split("train")
    everything = split.read(0, split.num_tokens)
    rng = np.random.default_rng(0)
    ranges = [sorted(rng.integers(0, split.num_tokens + 1, 2)) for _ in range(200)]
    for start, end in [*ranges, (0, 0), (split.num_tokens, split.num_tokens), (349, 351), (350, 400)]:
        np.testing.assert_array_equal(split.read(start, end - start), everything[start:end])
    for start, length in [(-1, 2), (0, split.num_tokens + 1), (split.num_tokens, 1), (3, -1)]:
        with pytest.raises(IndexError):
            split.read(start, length)


def test_a_read_opens_only_the_shards_it_needs(data, tmp_path, small_blocks):
    store = build(data, tmp_path / "store")
    split = store.split("train")
    expected = split.read(0, 60)
    for shard in split.shards[1:]:
        (store.path / shard.name).unlink()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(split)).read(0, 60), expected)


def test_threads_and_pickled_copies_read_the_same(data, tmp_path, small_blocks):
    split = build(data, tmp_path / "store").split("train")
    everything = split.read(0, split.num_tokens)
    copy = pickle.loads(pickle.dumps(split))
    starts = np.random.default_rng(1).integers(0, split.num_tokens - 80, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for start, tokens in zip(starts, pool.map(lambda start: copy.read(start, 80), starts), strict=True):
            np.testing.assert_array_equal(tokens, everything[start : start + 80])


def test_workers_do_not_change_a_byte(data, tmp_path):
    data.tokenizer, data.tokenizer_vocab_size = "sentencepiece", 290
    with open(data.path, "a") as file:  # several batches of a megabyte
        file.writelines(json.dumps({"text": f"{n} word" * 20_000}) + "\n" for n in range(40))
    alone, together = build(data, tmp_path / "alone", 1), build(data, tmp_path / "together", 2)
    names = sorted(path.name for path in alone.path.iterdir())
    assert names == sorted(path.name for path in together.path.iterdir())
    for name in names:
        assert (alone.path / name).read_bytes() == (together.path / name).read_bytes(), name


def test_the_manifest_says_what_is_in_the_store(data, tmp_path, small_blocks):
    store = build(data, tmp_path / "store")
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert manifest["corpus"]["path"] == data.path
    assert manifest["corpus"]["documents"] == len(TEXTS)
    assert manifest["corpus"]["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert manifest["tokenizer"] == {
        "kind": "bytes",
        "fingerprint": ByteTokenizer().fingerprint,
        "vocab_size": 257,
        "eod_id": 256,
    }
    assert (manifest["dtype"], manifest["block_tokens"]) == ("uint16", 50)
    for name in ("train", "eval"):
        split = manifest["splits"][name]
        assert sum(shard["records"] for shard in split["shards"]) == -(-split["tokens"] // 50)
        for shard in split["shards"]:
            content = (store.path / shard["name"]).read_bytes()
            assert len(content) == shard["bytes"]
            assert hashlib.sha256(content).hexdigest() == shard["sha256"]
    assert manifest["versions"]["sentencepiece"]


def encoded(*hashes: int) -> list[EncodedDocument]:
    return [EncodedDocument(np.full(3, index, np.int32), value, 3, 3) for index, value in enumerate(hashes)]


@pytest.mark.parametrize(
    "hashes, held_out",
    [
        ([9, 8, 7], {2}),  # all belong to train: the lowest hash goes to eval
        ([7, 8, 9], {0}),
        ([1, 2, 0], {0, 2}),  # all belong to eval: the highest hash goes to train
        ([9, 0], {1}),
        ([0, 9], {0}),
        ([6, 9, 0, 7, 1], {2, 4}),  # the one held back returns to its side
        ([9, 9], {0}),
    ],
)
def test_both_splits_get_a_document(hashes, held_out):
    placed = list(assign_splits(encoded(*[value << 60 for value in hashes]), 5 / 16, np.ones(9, np.int32)))
    assert {int(ids[0]) for name, ids, _ in placed if name == "eval"} == held_out
    assert sorted(int(ids[0]) for _, ids, _ in placed) == list(range(len(hashes)))


def test_the_tail_of_a_lone_document_is_held_out(data, tmp_path):
    text = "Käse 日本\n" * 500
    (tmp_path / "book.txt").write_text(text)
    data.path = str(tmp_path / "book.txt")
    store = build(data, tmp_path / "store")
    train, held_out = store.split("train"), store.split("eval")
    head, tail = train.read(0, train.num_tokens)[:-1], held_out.read(0, held_out.num_tokens)[:-1]
    assert store.tokenizer.decode_bytes(head) + store.tokenizer.decode_bytes(tail) == text.encode()
    assert held_out.num_bytes == len(tail) == round(0.1 * len(text.encode()))
    assert train.num_bytes == len(head)
    assert store.manifest["corpus"]["documents"] == 1


def test_vocabularies_beyond_16_bits_are_stored_in_32(data, tmp_path, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode_batch(self, texts):
            return [ids + 69_000 for ids in super().encode_batch(texts)]

    monkeypatch.setattr("latentjax.data.resolve.ByteTokenizer", Wide)
    store = build(data, tmp_path / "store")
    assert store.manifest["dtype"] == "uint32"
    tokens = store.split("train").read(0, 30)
    assert tokens.max() > 69_000


def test_a_raw_corpus_is_tokenised_once(data, tmp_path, monkeypatch):
    first = resolve_store(data, progress=False)
    assert first.path.parent == tmp_path / "cache"
    with monkeypatch.context() as context:
        context.setattr("latentjax.data.resolve.write_store", None)  # a second making would fail
        assert resolve_store(data, progress=False).path == first.path
    data.path = str(first.path)
    assert resolve_store(data, progress=False).path == first.path


@pytest.mark.parametrize(
    "key, value",
    [("eval_fraction", 0.2), ("tokenizer", "sentencepiece"), ("text_field", "text2"), ("path", "touch")],
)
def test_what_determines_a_store_makes_another(data, key, value):
    data.tokenizer_vocab_size = 290
    with open(data.path, "w") as file:
        file.writelines(json.dumps({"text": text, "text2": text + "!"}) + "\n" for text in TEXTS)
    before = resolve_store(data, progress=False)
    if value == "touch":
        os.utime(data.path, ns=(1, 1))
    else:
        data[key] = value
    after = resolve_store(data, progress=False)
    assert after.path != before.path and before.path.exists()


def test_a_failure_leaves_nothing_behind(data, tmp_path):
    with open(data.path, "a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=f"corpus.jsonl:{len(TEXTS) + 1}: not a JSON line"):
        resolve_store(data, progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_of_one_line_and_leaves_nothing(data, tmp_path, monkeypatch):
    # A device that takes no byte stands in for the shard: what ArrayRecord then does is its own.
    monkeypatch.setattr(store_writer._SplitWriter, "_shard_path", lambda self, number: Path("/dev/full"))
    with open(data.path, "a") as file:
        file.writelines(json.dumps({"text": "long" * 100_000}) + "\n" for _ in range(5))
    with pytest.raises(UserError, match="cannot write the token store: .*No space left on device"):
        resolve_store(data, progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_killed_making_is_cleared_away_and_not_taken_for_a_store(data, tmp_path):
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    store = resolve_store(data, progress=False)
    host = os.uname().nodename
    dead = store.path.with_name(f".{store.path.name}.partial-{host}-{int(finished.stdout)}")
    alive = store.path.with_name(f".{store.path.name}.partial-{host}-{os.getppid()}")
    store.path.rename(dead)
    alive.mkdir()
    again = resolve_store(data, progress=False)
    assert again.path == store.path
    assert not dead.exists() and alive.exists()


def test_a_store_made_meanwhile_by_another_process_is_kept(data, tmp_path, monkeypatch):
    rename = os.rename

    def other_is_first(source, target):
        monkeypatch.setattr(os, "rename", rename)
        build(data, target)
        (target / "first").touch()
        rename(source, target)

    (tmp_path / "stores").mkdir()
    monkeypatch.setattr(os, "rename", other_is_first)
    monkeypatch.setattr(store_writer.socket, "gethostname", iter(["a", "a", "b", "b"]).__next__)
    store = build(data, tmp_path / "stores" / "store")
    assert (store.path / "first").exists()
    assert [path.name for path in (tmp_path / "stores").iterdir()] == ["store"]


def test_something_else_in_the_way_is_not_replaced(data, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="cannot write the token store .*store"):
        build(data, tmp_path / "store")
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["thesis.txt"]


def test_missing_paths_say_what_to_do(data, tmp_path):
    data.path = ""
    with pytest.raises(UserError, match="data.path is empty.*python -m latentjax.prepare"):
        resolve_store(data, progress=False)
    data.path = str(tmp_path / "absent")
    with pytest.raises(
        UserError, match="nothing at .*absent; `python -m latentjax.prepare --input .* --output .*absent`"
    ):
        resolve_store(data, progress=False)


def _change_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | changes))


def _flip_a_token(path):
    shard = path / "train-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[3000] ^= 0xFF
    shard.write_bytes(content)


def _truncate(path):
    shard = path / "eval-00000.arrayrecord"
    shard.write_bytes(shard.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: (path / "manifest.json").unlink(), "cannot read .*manifest.json"),
        (lambda path: (path / "manifest.json").write_text('{"format'), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not the manifest"),
        (lambda path: (path / "manifest.json").write_text('{"format": "x"}'), "manifest.json is not the manifest"),
        (lambda path: _change_manifest(path, version=99), "manifest.json has format version 99.*upgrade latentjax"),
        (lambda path: _change_manifest(path, version=None), "manifest.json is not the manifest"),
        (lambda path: _change_manifest(path, splits={}), "manifest.json is damaged: it lacks 'train'"),
        (lambda path: _change_manifest(path, block_tokens=7), "manifest.json is damaged: the shards of train"),
        (lambda path: _change_manifest(path, block_tokens=0), "manifest.json is damaged"),
        (lambda path: _change_manifest(path, dtype="float8"), "manifest.json is damaged: unknown dtype 'float8'"),
        (lambda path: (path / "train-00000.arrayrecord").unlink(), "train-00000.arrayrecord is missing"),
        (_truncate, r"eval-00000.arrayrecord is damaged: \d+ bytes instead of"),
    ],
)
def test_a_damaged_store_names_the_file(data, tmp_path, damage, message):
    data.path = str(build(data, tmp_path / "store").path)
    damage(tmp_path / "store")
    with pytest.raises(UserError, match=message):
        resolve_store(data, progress=False)


def test_damage_within_a_shard_is_found_when_it_is_read(data, tmp_path):
    build(data, tmp_path / "store")
    _flip_a_token(tmp_path / "store")
    store = TokenStore(tmp_path / "store")
    with pytest.raises(UserError, match="train-00000.arrayrecord is damaged: cannot read block 0"):
        store.split("train").read(0, 10)
    with pytest.raises(UserError, match="train-00000.arrayrecord is damaged: its hash differs"):
        store.verify()


def test_a_tokenizer_of_another_store_is_refused(data, tmp_path):
    store = build(data, tmp_path / "store")
    _change_manifest(store.path, tokenizer=store.manifest["tokenizer"] | {"fingerprint": "0" * 64})
    with pytest.raises(UserError, match="tokenizer in .*store is not the one"):
        _ = TokenStore(store.path).tokenizer


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_the_fraction_held_out_is_within_limits(data, tmp_path, fraction):
    data.eval_fraction = fraction
    with pytest.raises(UserError, match="data.eval_fraction must be between 0 and 1"):
        build(data, tmp_path / "store")


def test_an_unknown_tokenizer_is_named(data, tmp_path):
    data.tokenizer = "wordpiece"
    with pytest.raises(UserError, match="unknown tokenizer 'wordpiece'"):
        build(data, tmp_path / "store")


def test_progress_reports_counts_and_what_was_left_out(data, tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abc")
    (tmp_path / "texts" / "b.txt").write_text("defg")
    (tmp_path / "texts" / "c.txt").write_bytes(b"\xff")
    data.path = str(tmp_path / "texts")
    stream = io.StringIO()
    store = build_store(data, open_corpus(data), tmp_path / "store", num_workers=1, progress=Progress(True, stream))
    assert stream.getvalue().startswith("tokenising: 2 documents, ")
    assert "left out 1 of 3 files" in stream.getvalue()
    assert store.manifest["corpus"]["skipped_not_utf8"] == ["c.txt"]
