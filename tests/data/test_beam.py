"""The Beam pipeline makes the same shards as local processes."""

import sys

import pytest

from latentjax.errors import UserError
from latentjax.prepare import main
from tests.data.stores import TEXTS, content_of, write_json_lines


def flags(tmp_path, name, *more):
    arguments = ["--input", str(tmp_path / "corpus"), "--tokenizer", "sentencepiece", "--vocab_size", "290"]
    return [*arguments, "--shard_megabytes", "1", "--output", str(tmp_path / name), *more]


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for number in range(5):
        texts = [f"{number} {n} words " * 5000 for n in range(12)] + TEXTS
        write_json_lines(tmp_path / "corpus" / f"{number}.jsonl", texts)


DIRECT = ("--beam_runner", "DirectRunner", "--num_workers", "2")


def test_the_direct_runner_makes_the_same_bytes_as_local_workers(tmp_path, corpus):
    assert main(flags(tmp_path, "local")) == 0
    assert main(flags(tmp_path, "beam", *DIRECT)) == 0
    local = content_of(tmp_path / "local")
    assert sum(name.startswith("train-") for name in local) == 3
    assert content_of(tmp_path / "beam") == local


def test_a_users_mistake_in_a_worker_is_one_line(tmp_path, corpus):
    with open(tmp_path / "corpus" / "1.jsonl", "a") as file:
        file.write('{"text": nothing}\n')
    place = rf"1\.jsonl:{12 + len(TEXTS) + 1}: not a JSON line"
    with pytest.raises(UserError, match=rf"^1 malformed documents, more than data.max_malformed=0; .*{place}"):
        main(flags(tmp_path, "beam", "--max_malformed", "0", *DIRECT))
    assert main(flags(tmp_path, "beam", "--max_malformed", "1", *DIRECT)) == 0
    assert not (tmp_path / "beam" / "records").exists()


def test_without_beam_it_says_what_to_install(tmp_path, corpus, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"--beam_runner needs Apache Beam: pip install 'latentjax\[beam\]'"):
        main(flags(tmp_path, "beam", *DIRECT))
    assert not (tmp_path / "beam").exists()
    with pytest.raises(UserError, match="--beam_options are for --beam_runner"):
        main(flags(tmp_path, "beam", "--beam_options=--project=x"))
