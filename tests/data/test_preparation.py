"""Preparation: the same bytes for any workers and interruptions, both sides filled, and nothing of others touched."""

import hashlib
import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from latentjax.data import preparation, tasks
from latentjax.data.corpus import Corpus
from latentjax.data.output import OutputDirectory
from latentjax.data.progress import Progress
from latentjax.data.readers.base import ReaderOptions
from latentjax.data.store import TokenStore
from latentjax.data.workers import run_in_processes
from latentjax.errors import UserError
from tests.data.stores import TEXTS, build, content_of, data_config, documents_of, write_json_lines

STDLIB = Path(os.__file__).parent


@pytest.fixture
def data(tmp_path):
    return data_config(write_json_lines(tmp_path / "corpus.jsonl", TEXTS), tmp_path / "cache")


@pytest.fixture
def tiny_tasks(monkeypatch, data):
    """About nine hundred bytes of input to a task."""
    monkeypatch.setattr("latentjax.data.resolve.MEGABYTE", 100)
    data.shard_megabytes = 9


def test_workers_do_not_change_a_byte(tmp_path, data):
    data.tokenizer, data.tokenizer_vocab_size, data.shard_megabytes = "sentencepiece", 290, 1
    write_json_lines(Path(data.path), [f"{n} word" * 20_000 for n in range(40)] + TEXTS)
    alone, together = build(data, tmp_path / "alone", 1), build(data, tmp_path / "together", 2)
    assert len(alone.split("train").shards) > 4
    assert content_of(alone.path) == content_of(together.path)


def test_the_row_does_not_depend_on_how_it_is_cut_into_tasks(tmp_path, data, tiny_tasks):
    cut = build(data, tmp_path / "cut")
    data.shard_megabytes = 0
    whole = build(data, tmp_path / "whole")
    assert len(cut.shards) > 10 and len(whole.shards) == 2
    for name in ("train", "eval"):
        assert documents_of(cut, name) == documents_of(whole, name)
    lengths = cut.manifest["corpus"]["document_lengths"]
    assert lengths == whole.manifest["corpus"]["document_lengths"] and sum(lengths.values()) == len(TEXTS)


def hash_of(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@pytest.mark.parametrize("share", [1e-9, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 5, 60])
def test_both_splits_get_a_document_whatever_the_share(tmp_path, data, tiny_tasks, share, count):
    """Where all belong on one side the one nearest to the border goes to the other, from whatever task it is in."""
    texts = [f"text {n} " * 20 for n in range(count)]
    write_json_lines(Path(data.path), texts)
    data.eval_fraction = share
    store = build(data, tmp_path / "store")
    order = sorted(texts, key=hash_of)
    held_out = order[:1] if share < 0.5 else order[:-1]
    assert documents_of(store, "eval") == [text for text in texts if text in held_out]
    assert documents_of(store, "train") == [text for text in texts if text not in held_out]
    assert store.manifest["corpus"]["documents"] == count
    names = {path.name for path in store.path.iterdir()}
    assert {shard.name for shard in store.shards} == {name for name in names if name.endswith("record")}


@pytest.mark.parametrize("size", [500, 200_000])
def test_the_tail_of_a_lone_document_is_held_out(tmp_path, data, size):
    """Also where it is so long that it comes in pieces and, being cut for several tasks, in several shards."""
    text = "Käse 日本\n" * size
    (tmp_path / "book.txt").write_text(text)
    data.path, data.shard_megabytes = str(tmp_path / "book.txt"), 1
    store = build(data, tmp_path / "store")
    train, held_out = store.split("train"), store.split("eval")
    head, tail = train.read(0, train.num_tokens)[:-1], held_out.read(0, held_out.num_tokens)[:-1]
    assert store.tokenizer.decode_bytes(head) + store.tokenizer.decode_bytes(tail) == text.encode()
    assert len(tail) == pytest.approx(0.1 * len(text.encode()), abs=4)
    assert (train.num_bytes, held_out.num_bytes) == (len(head), len(tail))
    assert train.read(train.num_tokens - 1, 1) == store.eod_id
    assert store.manifest["corpus"]["documents"] == 1


def test_a_document_longer_than_a_shard_is_one_document(tmp_path, data):
    long = "".join(f"línea {n}\n" for n in range(1_250_000)) + "no line end"
    directory = tmp_path / "texts"
    directory.mkdir()
    for name, text in {"a.txt": "first", "b.txt": long, "c.txt": "", "d.txt": "dernière", "e.txt": "x" * 3000}.items():
        (directory / name).write_text(text)
    data.path, data.shard_megabytes, data.eval_fraction = str(directory), 1, 0.3
    store = build(data, tmp_path / "store", num_workers=2)
    found = documents_of(store, "train") + documents_of(store, "eval")
    assert sorted(found) == sorted(["first", long, "", "dernière", "x" * 3000])
    assert len(store.shards) > 15
    lengths = store.manifest["corpus"]["document_lengths"]
    assert sum(lengths.values()) == 5 and max(map(int, lengths)) == 25  # the long one counts as a whole


@pytest.mark.parametrize("kills", [pytest.param(4, id="short"), pytest.param(20, marks=pytest.mark.long)])
def test_killed_again_and_again_it_comes_out_the_same(tmp_path, kills):
    """SIGKILL at random moments, of the command and, through it, of its workers."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    sources = b"".join(path.read_bytes() for path in sorted(STDLIB.glob("*.py")))
    for n in range(40):
        (corpus / f"{n}.txt").write_text(f"file {n}\n" + sources[n * 50_000 :][:2_000_000].decode(errors="ignore"))

    def command(output):
        flags = ["--input", str(corpus), "--tokenizer", "bytes", "--output", str(output)]
        flags += ["--shard_megabytes", "1", "--num_workers", "2", "--eval_fraction", "0.2"]
        return [sys.executable, "-m", "latentjax.prepare", *flags]

    began = time.monotonic()
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    seconds = time.monotonic() - began
    whole = {name: hashlib.sha256(content).hexdigest() for name, content in content_of(tmp_path / "whole").items()}
    assert len(whole) > 40
    rng, killed, attempt, continued = random.Random(kills), 0, 0, False
    while killed < kills:
        attempt += 1
        output = tmp_path / f"attempt-{attempt}"
        while True:
            process = subprocess.Popen(command(output), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            try:
                _, said = process.communicate(timeout=rng.uniform(0.5, 1.0) * seconds if killed < kills else 300)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.communicate()
                killed += 1
                if (output / "manifest.json").exists():
                    break
                for path in output.glob("*.arrayrecord"):  # no half-written shard is ever visible
                    assert hashlib.sha256(path.read_bytes()).hexdigest() == whole[path.name]
                with pytest.raises(UserError, match="is not finished|is no token store"):
                    TokenStore(output)
            else:
                assert process.returncode == 0, said
                continued = continued or "shards are there already" in said
                break
        # Killed between the manifest and the removal of records, the next call clears nothing: compare what counts.
        left = {name: hashlib.sha256(content).hexdigest() for name, content in content_of(output).items()}
        assert {name: digest for name, digest in left.items() if name in whole} == whole
    assert continued


def test_interrupted_between_any_two_tasks_it_comes_out_the_same(tmp_path, data, tiny_tasks):
    whole = content_of(build(data, tmp_path / "whole").path)
    corpus = Corpus(data.path, data.include, data.exclude, ReaderOptions("text", False))
    done = []

    def one_and_die(job, pending, stage):
        tasks.run_task(job, pending[0], stage.advance)
        done.append(pending[0].number)
        raise KeyboardInterrupt

    for round_number in range(100):
        run = one_and_die if round_number % 2 else lambda job, pending, stage: one_and_die(job, pending[::-1], stage)
        try:
            from latentjax.data.resolve import build_store

            build_store(data, corpus, OutputDirectory(str(tmp_path / "store")), run, Progress(False))
        except KeyboardInterrupt:
            continue
        break
    assert len(done) == len(set(done)) > 8
    assert content_of(tmp_path / "store") == whole


def test_two_at_once_help_each_other(tmp_path, data, tiny_tasks):
    """Another process that makes the same store at the same time, and is done first, is no reason to fail."""
    whole = content_of(build(data, tmp_path / "whole").path)
    corpus = Corpus(data.path, data.include, data.exclude, ReaderOptions("text", False))
    output = OutputDirectory(str(tmp_path / "store"))

    def other_is_first(job, pending, stage):
        tasks.run_task(job, pending[0], stage.advance)
        build(data, tmp_path / "store")
        run_in_processes(job, pending[1:], stage, num_workers=1)

    from latentjax.data.resolve import build_store

    build_store(data, corpus, output, other_is_first, Progress(False))
    assert content_of(tmp_path / "store") == whole


def test_what_killed_processes_left_is_cleared_away(tmp_path, data):
    finished = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = os.uname().nodename.replace(".", "-")
    (tmp_path / "store").mkdir()
    dead = tmp_path / "store" / f".train-00000.arrayrecord.{host}-{int(finished.stdout)}.tmp"
    alive = tmp_path / "store" / f".train-00000.arrayrecord.{host}-{os.getppid()}.tmp"
    dead.touch()
    alive.touch()
    build(data, tmp_path / "store")
    assert not dead.exists() and alive.exists()


def test_a_killed_worker_is_told_and_nothing_is_lost(tmp_path, data, tiny_tasks, monkeypatch):
    whole = content_of(build(data, tmp_path / "whole").path)
    monkeypatch.setattr("latentjax.data.workers._run", _die_on_task_five)
    with pytest.raises(UserError, match=r"worker process was killed .*the same command continues"):
        build(data, tmp_path / "store", num_workers=2)
    monkeypatch.undo()
    monkeypatch.setattr("latentjax.data.resolve.MEGABYTE", 100)
    stream = io.StringIO()
    build(data, tmp_path / "store", stream=stream)
    assert "shards are there already" in stream.getvalue()
    assert content_of(tmp_path / "store") == whole


def _die_on_task_five(task):
    from latentjax.data import workers

    if task.number == 5:
        time.sleep(1)  # until others are done
        os.kill(os.getpid(), signal.SIGKILL)
    workers.run_task(workers._job, task, workers._report)


def test_malformed_documents_are_left_out_up_to_a_limit_over_all_tasks(tmp_path, data, tiny_tasks):
    lines = Path(data.path).read_text().splitlines(keepends=True)
    for place in (3, 20, 40):
        lines.insert(place, '{"text": broken\n')
    Path(data.path).write_text("".join(lines))
    data.max_malformed = 2
    with pytest.raises(UserError, match="3 malformed documents, more than data.max_malformed=2; the first .*:4: not"):
        build(data, tmp_path / "store")
    data.max_malformed = 3
    stream = io.StringIO()
    store = build(data, tmp_path / "store", stream=stream)
    assert sorted(documents_of(store, "train") + documents_of(store, "eval")) == sorted(TEXTS)
    assert "left out 3 malformed documents; the first: " in stream.getvalue()
    assert store.manifest["corpus"]["malformed"] == 3
    places = [place.split(": ")[0] for place in store.manifest["corpus"]["first_malformed"]]
    assert places == [f"{data.path}:{line}" for line in (4, 21, 41)]


def test_files_that_are_not_text_are_left_out_and_counted(tmp_path, data):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("abc")
    (tmp_path / "texts" / "b.txt").write_text("defg")
    (tmp_path / "texts" / "c.txt").write_bytes(b"\xff")
    data.path = str(tmp_path / "texts")
    stream = io.StringIO()
    store = build(data, tmp_path / "store", stream=stream)
    assert "tokenising: 2 documents, " in stream.getvalue()
    assert "left out 1 of 3 files, which are not UTF-8 text; the first: c.txt" in stream.getvalue()
    assert store.manifest["corpus"]["left_out"] == 1


@pytest.mark.parametrize(
    "content, message",
    [("", "is empty: 1 files, no text in them"), ("x", "is one document of 1 bytes: too little to hold any out")],
)
def test_too_little_text(tmp_path, data, content, message):
    Path(data.path).write_text(content and '{"text": "x"}\n')
    with pytest.raises(UserError, match=message):
        build(data, tmp_path / "store")


def test_another_store_or_a_thesis_in_the_way_is_not_touched(tmp_path, data):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"store is in use, and not by a token store \(it holds thesis.txt\)"):
        build(data, tmp_path / "store")
    assert content_of(tmp_path / "store") == {"thesis.txt": b"years of work"}
    build(data, tmp_path / "other")
    before = content_of(tmp_path / "other")
    data.eval_fraction = 0.2
    with pytest.raises(UserError, match="other holds a store of another corpus, another tokenizer or other settings"):
        build(data, tmp_path / "other")
    assert content_of(tmp_path / "other") == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_of_one_line_and_leaves_no_shard(tmp_path, data, monkeypatch):
    # A device that takes no byte stands in for the shard: what ArrayRecord then does is its own.
    shard_writer = tasks.ShardWriter
    monkeypatch.setattr(tasks, "ShardWriter", lambda path, dtype: shard_writer("/dev/full", dtype))
    write_json_lines(Path(data.path), ["long" * 100_000] * 5)
    with pytest.raises(UserError, match="cannot write the token store: .*No space left on device"):
        build(data, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_an_output_that_cannot_be_written(tmp_path, data):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/store: Not a directory"):
        build(data, tmp_path / "file" / "store")


def test_lengths_of_documents_over_several_tasks_are_joined():
    def record(**values):
        return tasks.TaskRecord(0, None, **values)

    records = [
        record(beginnings=3, units=9, lengths={"2": 2}, tail=5),  # the third goes on
        record(beginnings=0, units=9, tail=7),
        record(beginnings=1, units=9, lengths={"0": 1}, head=4),  # and ends, 16 tokens long
        record(beginnings=1, units=9, tail=1),
        record(beginnings=0, units=9, head=0),
    ]
    assert preparation._document_lengths(records) == {"0": 1, "1": 1, "2": 2, "5": 1}


def test_a_rule_leaves_alone_what_it_would_not_change():
    record = tasks.TaskRecord(100, None, beginnings=2, units=5, lowest_hash=150, highest_hash=300)
    assert record.holds_under(tasks.HeldOut(100)) and record.holds_under(tasks.HeldOut(150))
    assert not record.holds_under(tasks.HeldOut(151)) and not record.holds_under(tasks.HeldOut(100, cut=3))
    low = tasks.TaskRecord(400, None, beginnings=2, units=5, lowest_hash=150, highest_hash=300)
    assert low.holds_under(tasks.HeldOut(301)) and not low.holds_under(tasks.HeldOut(300))
    assert tasks.TaskRecord(0, None).holds_under(tasks.HeldOut(7, cut=1))


def test_token_ids_beyond_the_vocabulary_are_refused_with_their_place(tmp_path, data):
    Path(data.path).write_text('{"text": [1, 2, 256]}\n{"text": [5, 999]}\n')
    with pytest.raises(UserError, match=r"corpus.jsonl:2.*999"):
        build(data, tmp_path / "store")


@pytest.mark.parametrize("packed", [False, True])
def test_rows_of_token_ids(tmp_path, data, packed):
    """Documents get one end of document each, whether they bring it or not; rows of a stream are only joined."""
    rows = [[104, 105], [65, 256], [], [66, 67, 68], [256, 69]] * 4
    Path(data.path).write_text("".join(f'{{"text": {row}}}\n' for row in rows))
    data.packed_rows, data.eval_fraction = packed, 0.3
    store = build(data, tmp_path / "store")
    ends = [] if packed else [256]
    wanted = [row if not packed and row[-1:] == [256] else row + ends for row in rows]
    hashes = [
        int.from_bytes(hashlib.blake2b(np.array(row, "<i8").tobytes(), digest_size=8).digest(), "little")
        for row in rows
    ]
    border = store.manifest["held_out"]["border"]
    for name in ("train", "eval"):
        split = store.split(name)
        expected = [row for row, value in zip(wanted, hashes) if (value < border) == (name == "eval")]
        np.testing.assert_array_equal(split.read(0, split.num_tokens), [token for row in expected for token in row])
