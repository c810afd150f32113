"""The verb prepare, from the command line."""

import subprocess
import sys

import pytest

from latentjax.data.store import TokenStore
from latentjax.errors import UserError
from latentjax.prepare import main


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
    assert store.manifest["eval_fraction"] == 0.2


def test_the_same_store_again_is_already_there_and_another_is_refused(corpus, tmp_path, capsys):
    arguments = flags(corpus, tmp_path / "store", "--tokenizer", "sentencepiece", "--vocab_size")
    assert main([*arguments, "300"]) == 0
    before = (tmp_path / "store" / "manifest.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main([*arguments, "300"]) == 0
    assert capsys.readouterr().out.startswith("already there: 20 documents, ")
    assert (tmp_path / "store" / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="--output .*store is in use"):
        main([*arguments, "305"])


def test_a_model_file_is_taken_as_it_is(corpus, tmp_path):
    main(flags(corpus, tmp_path / "first", "--tokenizer", "sentencepiece", "--vocab_size", "300"))
    model = tmp_path / "first" / "tokenizer.model"
    main(flags(corpus, tmp_path / "second", "--tokenizer", str(model)))
    first, second = TokenStore(tmp_path / "first"), TokenStore(tmp_path / "second")
    assert first.tokenizer.fingerprint == second.tokenizer.fingerprint
    assert first.manifest["splits"] == second.manifest["splits"]


@pytest.mark.parametrize(
    "change, message",
    [
        (["--tokenizer", "wordpiece"], "unknown tokenizer 'wordpiece'"),
        (["--tokenizer", "absent.model"], "cannot read the tokenizer absent.model"),
        (["--tokenizer", "bytes", "--vocab_size", "300"], "--vocab_size is for --tokenizer sentencepiece"),
        (["--tokenizer", "bytes", "--vocab_siz", "300"], "unrecognized arguments: --vocab_siz"),
        (["--tokenizer", "bytes", "--num_workers", "two"], "invalid int value: 'two'"),
        (["--tokenizer", "bytes", "--num_workers", "0"], "number of workers must be at least 1"),
        (["--tokenizer", "sentencepiece"], "vocabulary of 8192 is too large for this corpus: the largest"),
        (["--tokenizer", "bytes", "--include", "*.md"], r"no file under .* matches include \*.md"),
        ([], "required: --tokenizer"),
    ],
)
def test_mistakes_are_told(corpus, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        main(flags(corpus, tmp_path / "store", *change))
    assert not (tmp_path / "store").exists()


def run(*arguments):
    command = [sys.executable, "-m", "latentjax.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_from_the_shell_a_mistake_is_one_line_and_status_2(corpus, tmp_path):
    for arguments in (["--input"], flags(tmp_path / "absent", tmp_path / "store", "--tokenizer", "bytes")):
        done = run(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("latentjax.prepare: error: ") and done.stderr.count("\n") == 1


def test_from_the_shell_with_workers(corpus, tmp_path):
    main(flags(corpus, tmp_path / "alone", "--tokenizer", "bytes"))
    done = run(*flags(corpus, tmp_path / "store", "--tokenizer", "bytes", "--num_workers", "2"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1 and str(tmp_path / "store") in done.stdout
    assert "tokenising: 20 documents" in done.stderr
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "store" / path.name).read_bytes()
