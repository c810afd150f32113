"""The verb prepare, from the command line."""

import json
import os
import subprocess
import sys

import pytest

from latentjax.data.store import TokenStore
from latentjax.errors import UserError
from latentjax.prepare import main
from tests.data.stores import content_of, documents_of


@pytest.fixture
def corpus(tmp_path):
    directory = tmp_path / "corpus"
    (directory / "skip").mkdir(parents=True)
    for n in range(20):
        (directory / f"{n}.py").write_text(f"def f_{n}(x):\n    return x + {n}\n" * 20)
    (directory / "skip" / "no.py").write_text("no")
    (directory / "notes.txt").write_text("notes")
    return directory


def flags(corpus, output, *more):
    return ["--input", str(corpus), "--include", "**/*.py", "--exclude", "skip", "--output", str(output), *more]


def test_bytes_store_and_its_summary(corpus, tmp_path, capsys):
    output = tmp_path / "store"
    assert main(flags(corpus, output, "--tokenizer", "bytes", "--eval_fraction", "0.2")) == 0
    store = TokenStore(output)
    size = sum(path.stat().st_size for path in corpus.glob("*.py"))
    tokens = store.split("train").num_tokens + store.split("eval").num_tokens
    assert tokens == size + 20  # an end of document each
    summary = capsys.readouterr().out
    assert summary.startswith(f"20 documents, {tokens:,} tokens ({store.split('eval').num_tokens:,} held out)")
    assert f"{size / tokens:.3f} bytes per token" in summary and summary.endswith(f"in {output}\n")
    assert store.manifest["held_out"]["fraction"] == 0.2


def test_the_same_store_again_is_already_there_and_another_is_refused(corpus, tmp_path, capsys):
    arguments = flags(corpus, tmp_path / "store", "--tokenizer", "sentencepiece", "--vocab_size")
    assert main([*arguments, "300"]) == 0
    before = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*arguments, "300"]) == 0
    assert capsys.readouterr().out.startswith("already there: 20 documents, ")
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="store holds a store of another corpus, another tokenizer or other settings"):
        main([*arguments, "305"])


def test_a_model_file_or_the_tokenizer_of_a_store_is_taken_as_it_is(corpus, tmp_path):
    main(flags(corpus, tmp_path / "first", "--tokenizer", "sentencepiece", "--vocab_size", "300"))
    first = TokenStore(tmp_path / "first")
    for name, tokenizer in {"second": "tokenizer/tokenizer.model", "third": "tokenizer"}.items():
        main(flags(corpus, tmp_path / name, "--tokenizer", str(first.path / tokenizer)))
        store = TokenStore(tmp_path / name)
        assert store.tokenizer.fingerprint == first.tokenizer.fingerprint
        assert store.manifest["splits"] == first.manifest["splits"]


def test_a_glob_and_a_field_of_json_lines(tmp_path):
    for n in range(4):
        lines = [json.dumps({"body": f"number {n}, line {line}"}) for line in range(5)]
        (tmp_path / f"part-{n}.jsonl").write_text("\n".join(lines))
    arguments = ["--input", str(tmp_path / "part-[0-2].jsonl"), "--tokenizer", "bytes", "--text_field", "body"]
    assert main([*arguments, "--output", str(tmp_path / "store"), "--eval_fraction", "0.3"]) == 0
    store = TokenStore(tmp_path / "store")
    texts = [f"number {n}, line {line}" for n in range(3) for line in range(5)]
    assert sorted(documents_of(store, "train") + documents_of(store, "eval")) == texts


def test_verify_finds_a_flipped_bit(corpus, tmp_path, capsys):
    output = tmp_path / "store"
    main(flags(corpus, output, "--tokenizer", "bytes"))
    capsys.readouterr()
    assert main(["--verify", str(output)]) == 0
    assert capsys.readouterr().out == f"2 shards and the tokenizer of {output} are as they were written\n"
    shard = output / "eval-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1  # in the padding, which no read would notice
    shard.write_bytes(content)
    with pytest.raises(UserError, match="1 of 2 shards of .*store are damaged .*: eval-00000.arrayrecord"):
        main(["--verify", str(output)])


def test_inspect_shows_what_is_there(corpus, tmp_path, capsys):
    output = tmp_path / "store"
    main(flags(corpus, output, "--tokenizer", "bytes", "--eval_fraction", "0.2"))
    capsys.readouterr()
    assert main(["--inspect", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    store = TokenStore(output)
    assert facts["splits"]["train"]["tokens"] == store.split("train").num_tokens
    assert facts["corpus"]["documents"] == 20
    first = next(path for path in sorted(corpus.glob("*.py")) if path.read_text() in documents_of(store, "train"))
    assert facts["samples"]["train"] == first.read_text()[:64]
    assert main(["--inspect", str(output)]) == 0
    shown = capsys.readouterr().out
    sizes = [path.stat().st_size for path in corpus.glob("*.py")]
    assert "\n  | def f_" in shown and f"{sum(sizes) / 1e6:,.1f} MB" in shown
    counts = [int(line.split()[3]) for line in shown.splitlines() if " to " in line]
    assert sum(counts) == 20 and all(sum(512 <= size < 1024 for size in sizes) == count for count in counts)


@pytest.mark.parametrize(
    "change, message",
    [
        (["--tokenizer", "wordpiece"], "wordpiece"),
        (["--tokenizer", "absent.model"], "cannot read .*absent.model|no tokenizer .*absent.model"),
        (["--tokenizer", "bytes", "--vocab_size", "300"], "--vocab_size is for --tokenizer sentencepiece"),
        (["--tokenizer", "bytes", "--vocab_siz", "300"], "unrecognized arguments: --vocab_siz"),
        (["--tokenizer", "bytes", "--num_workers", "two"], "invalid int value: 'two'"),
        (["--tokenizer", "bytes", "--num_workers", "0"], "--num_workers must be at least 1, not 0"),
        (["--tokenizer", "bytes", "--shard_megabytes", "-1"], "--shard_megabytes must be at least 0, not -1"),
        (["--tokenizer", "bytes", "--eval_fraction", "1"], "--eval_fraction must be between 0 and 1, not 1.0"),
        (["--tokenizer", "bytes", "--eval_fraction", "0"], "--eval_fraction must be between 0 and 1, not 0.0"),
        (["--tokenizer", "bytes", "--beam_runner", "Cray"], "invalid choice: 'Cray'"),
        (["--tokenizer", "sentencepiece"], "vocabulary of 8192 is too large for this corpus: the largest"),
        (["--tokenizer", "bytes", "--include", "*.md"], "--include is given twice: give it once"),
        (["--tokenizer", "bytes", "--output", "x"], "--output is given twice: give it once"),
        ([], "--tokenizer is missing"),
    ],
)
def test_mistakes_are_told(corpus, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        main(flags(corpus, tmp_path / "store", *change))
    assert not (tmp_path / "store").exists()


def test_a_url_without_its_package(tmp_path):
    with pytest.raises(UserError, match="needs the package s3fs: pip install s3fs"):
        main(flags("s3://bucket/pile", tmp_path / "store", "--tokenizer", "bytes"))


def run(*arguments):
    command = [sys.executable, "-m", "latentjax.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_from_the_shell_a_mistake_is_one_line_and_status_2(corpus, tmp_path):
    for arguments in (["--input"], flags(tmp_path / "absent", tmp_path / "store", "--tokenizer", "bytes")):
        done = run(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("latentjax.prepare: error: ") and done.stderr.count("\n") == 1


def test_from_the_shell_with_workers(corpus, tmp_path):
    for n in range(3):
        (corpus / f"large-{n}.py").write_text(f"x = {n}\n" * 200_000)
    arguments = ["--tokenizer", "bytes", "--shard_megabytes", "1"]
    main(flags(corpus, tmp_path / "alone", *arguments, "--num_workers", "1"))
    done = run(*flags(corpus, tmp_path / "store", *arguments, "--num_workers", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and str(tmp_path / "store") in done.stdout
    assert "tokenising: 23 documents" in done.stderr
    alone = content_of(tmp_path / "alone")
    assert len(alone) > 4 and content_of(tmp_path / "store") == alone


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_without_permission(corpus, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write .*locked.*: Permission denied"):
        main(flags(corpus, tmp_path / "locked" / "store", "--tokenizer", "bytes"))
