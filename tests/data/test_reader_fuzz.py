"""Stores, Megatron data and corpora, damaged in every way."""

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import megatron_files
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.reading import open_corpus
from data.stores import TEXTS, build, data_config, write_json_lines
from fuzzing import AMOUNTS, damaged, damaged_json, try_many

from latentjax.data.inspection import describe, inspect
from latentjax.data.megatron import MegatronRow
from latentjax.data.output import OutputDirectory
from latentjax.data.readers.base import LeftOut, Malformed, Piece
from latentjax.data.readers.compressed import zstd
from latentjax.data.store import MANIFEST_FILE, TokenStore
from latentjax.data.tokenizers.base import DESCRIPTION_FILE
from latentjax.data.tokenizers.saved import load_tokenizer

ROOT = Path(__file__).parents[2]
PARITY = ROOT / "tests" / "fixtures" / "parity" / "llama-vanilla-gqa"


@pytest.fixture
def store(tmp_path):
    """A store of bytes that a test may damage."""
    return build(
        data_config(write_json_lines(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "cache"), tmp_path / "store"
    )


@AMOUNTS
def test_manifest_of_a_store(amount, store):
    """What is accepted is read whole, or a shard is found not to be what the manifest says."""
    path = store.path / MANIFEST_FILE

    def check(content):
        path.write_bytes(content)
        opened = TokenStore(store.path)
        for name in ("train", "eval"):
            split = opened.split(name)
            if split.num_tokens >= 40:
                starts = np.array([0, split.num_tokens - 40])
                assert split.read_windows(starts, 40).shape == (2, 40)
        describe(inspect(opened))

    valid = json.loads(path.read_text())
    check(path.read_bytes())
    try_many(amount * 2, damaged_json(valid), check)


@AMOUNTS
def test_other_json_of_a_store(amount, store):
    """The description of the tokenizer, and what a preparation keeps."""
    directory = store.path / "tokenizer"
    valid = json.loads((directory / DESCRIPTION_FILE).read_text())

    def check(content):
        (directory / DESCRIPTION_FILE).write_bytes(content)
        load_tokenizer(directory)
        OutputDirectory(str(directory)).read_json(DESCRIPTION_FILE)

    try_many(amount // 2, damaged_json(valid), check)


@AMOUNTS
def test_shards(amount, store):
    """Flipped bytes are found wherever they are; what is read is what was written."""
    split = store.split("train")
    path = store.path / split.shards[0].name
    valid, expected = path.read_bytes(), split.read(0, split.num_tokens)

    def check(content):
        path.write_bytes(content)
        train = TokenStore(store.path).split("train")
        np.testing.assert_array_equal(train.read(0, train.num_tokens), expected)

    try_many(amount // 2, damaged(valid), check)


@AMOUNTS
@pytest.mark.parametrize("lengths", [(7, 7, 7, 7), (3, 0, 9, 1)])
def test_megatron(amount, lengths, tmp_path):
    sequences = [range(length) for length in lengths]
    index = megatron_files.write(tmp_path / "data", sequences)
    valid, tokens = index.read_bytes(), (tmp_path / "data.bin").read_bytes()

    def check(content):
        index.write_bytes(content)
        row = MegatronRow(index, 300)
        length = min(row.num_tokens, 5)
        if length:
            windows = row.read_windows(np.array([0, row.num_tokens - length]), length)
            assert windows.shape == (2, length) and windows.min() >= 0 and windows.max() < 300

    check(valid)
    try_many(amount * 2, damaged(valid), check)
    index.write_bytes(valid)

    def check_tokens(content):
        (tmp_path / "data.bin").write_bytes(content)
        row = MegatronRow(index, 300)
        row.read(0, row.num_tokens)

    try_many(amount // 2, damaged(tokens), check_tokens)


def _parquet(path):
    pq.write_table(pa.table({"text": TEXTS, "n": list(range(len(TEXTS)))}), path, row_group_size=20)


def _arrow(path):
    table = pa.table({"text": TEXTS})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=20)


_LINES = "".join(json.dumps({"text": text, "n": [1, {"a": None}]}) + "\n" for text in TEXTS).encode()
_WRITERS = {
    "jsonl": lambda path: path.write_bytes(_LINES),
    "jsonl.gz": lambda path: path.write_bytes(gzip.compress(_LINES)),
    "jsonl.zst": lambda path: path.write_bytes(zstd.compress(_LINES)),
    "txt": lambda path: path.write_bytes("".join(TEXTS).encode()),
    "parquet": _parquet,
    "arrow": _arrow,
}


@AMOUNTS
@pytest.mark.parametrize("suffix", _WRITERS)
def test_corpora(amount, suffix, tmp_path):
    """Every document is read, counted as malformed, or the file is refused."""
    path = tmp_path / f"corpus.{suffix}"
    _WRITERS[suffix](path)
    valid = path.read_bytes()

    def check(content):
        path.write_bytes(content)
        corpus = open_corpus(path)
        items = [item for span in corpus.spans(400) for item in corpus.read(span)]
        assert all(isinstance(item, Piece | Malformed | LeftOut) for item in items)
        assert all(len(item.reason) < 6000 for item in items if isinstance(item, Malformed))
        assert sum(len(item.content) for item in items if isinstance(item, Piece)) <= 100 * len(_LINES)
        return items

    assert len([item for item in check(valid) if isinstance(item, Piece)]) == (1 if suffix == "txt" else len(TEXTS))
    try_many(amount, damaged(valid), check)


@AMOUNTS
def test_lines_of_json(amount, tmp_path):
    """A damaged line is one malformed document, and the others are read."""
    path = tmp_path / "corpus.jsonl"
    good = json.dumps({"text": "good"}).encode() + b"\n"

    def check(line):
        line = line.replace(b"\n", b" ").replace(b"\r", b" ")
        path.write_bytes(good + line + b"\n" + good)
        corpus = open_corpus(path)
        items = [item for span in corpus.spans(1 << 20) for item in corpus.read(span)]
        assert [item.content for item in (items[0], items[-1])] == ["good", "good"]
        assert len(items) in (2, 3)

    try_many(amount, damaged_json({"text": "abc", "other": [1, {"x": 2}]}), check)


_BOMBS = """
import resource, sys
from pathlib import Path
import numpy as np
from latentjax.data.corpus import Corpus
from latentjax.data.megatron import MegatronRow
from latentjax.data.readers.base import ReaderOptions
from latentjax.data.store import TokenStore
from latentjax.data.tokenizers.saved import read_tokenizer
from latentjax.errors import UserError
from latentjax.interop.pretrained import load_pretrained

load_pretrained(sys.argv[1])  # jax and its threads
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30),) * 2)

def corpus(path):
    corpus = Corpus(path, ["**/*"], [], ReaderOptions("text", False))
    return [item for span in corpus.spans(1 << 20) for item in corpus.read(span)]

def megatron(path):
    row = MegatronRow(path, 300)
    return row.read_windows(np.array([row.num_tokens - 4]), 4)

kinds = {"store": TokenStore, "idx": megatron, "json": read_tokenizer, "model": load_pretrained, "corpus": corpus}
for line in sys.argv[2:]:
    kind, path = line.split("=", 1)
    try:
        print(kind, "accepted", len(str(kinds[kind](path))) > 0)
    except UserError as error:
        print(kind, "refused", error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the size of a process")
def test_what_claims_to_be_huge_takes_no_memory(store, tmp_path):
    """Counts and sizes of 2**60 in every header, in a process that may grow by 2 GiB at most."""
    manifest = json.loads((store.path / MANIFEST_FILE).read_text())
    places = []
    for number, (keys, value) in enumerate(
        [
            (["block_tokens"], 2**60),
            (["block_tokens"], 2**33),
            (["splits", "train", "tokens"], 2**60),
            (["splits", "train", "shards", 0, "tokens"], 2**60),
            (["splits", "train", "shards", 0, "bytes"], 2**60),
            (["tokenizer", "vocab_size"], 2**60),
        ]
    ):
        place = tmp_path / f"store{number}"
        shutil.copytree(store.path, place)
        changed = node = json.loads(json.dumps(manifest))
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        (place / MANIFEST_FILE).write_text(json.dumps(changed))
        places.append(f"store={place}")
    index = megatron_files.write(tmp_path / "data", [range(7), range(9)])
    valid = index.read_bytes()
    for number, (at, layout, value) in enumerate(
        [(18, "<Q", 2**60), (26, "<Q", 2**60), (18, "<Q", 2**64 - 1), (34, "<i", 2**31 - 1), (42, "<q", 2**63 - 1)]
    ):
        path = tmp_path / f"data{number}.idx"
        path.write_bytes(valid[:at] + struct.pack(layout, value) + valid[at + struct.calcsize(layout) :])
        shutil.copy(tmp_path / "data.bin", path.with_suffix(".bin"))
        places.append(f"idx={path}")
    vocabulary = {chr(256 + n): n for n in range(9)} | {"</s>": 2**32 - 2}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary, "merges": []}}))
    places.append(f"json={tmp_path / 'tokenizer.json'}")
    for number, header in enumerate(
        [
            {"x": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}},
            {"x": {"dtype": "F32", "shape": [2**31, 2**31, 2**31], "data_offsets": [0, 8]}},
            {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
            {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in "xy"},  # one over the other
            {"x": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}},
            None,
        ]
    ):
        folder = tmp_path / f"model{number}"
        shutil.copytree(PARITY, folder)
        text = json.dumps(header).encode()
        length = 2**62 if header is None else len(text)
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text + bytes(8))
        places.append(f"model={folder}")
    for suffix in ("parquet", "arrow", "jsonl.gz", "jsonl.zst"):
        path = tmp_path / f"corpus.{suffix}"
        _WRITERS[suffix](path)
        content = bytearray(path.read_bytes())
        content[4:12] = struct.pack("<Q", 2**60)
        path.write_bytes(content)
        places.append(f"corpus={path}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _BOMBS, str(PARITY), *places]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(places), done.stdout
    # Two say something of what is not read here: the vocabulary, and counts of what would come later.
    accepted = [place for place, line in zip(places, lines) if "accepted" in line]
    assert len(accepted) <= 4, accepted
