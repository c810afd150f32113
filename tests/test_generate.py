"""`python -m latentjax.generate`, and how ids become text on the way."""

import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from latentjax import generate
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.errors import UserError
from latentjax.generating import Generator, TextStream, read_prompts
from latentjax.opening import open_model
from latentjax.training.completion import Sampling

GREEDY = Sampling()


@pytest.fixture(scope="module")
def generator(whole_run: Path) -> Generator:
    return Generator(open_model(whole_run))


def greedy_by_hand(opened, ids: list[int], num_tokens: int) -> list[int]:
    """Token by token from an empty cache, by the method's own definition of decoding."""
    model, start = opened.model, len(ids)
    decode = jax.jit(
        lambda token, position, cache: model.apply({"params": opened.params}, token, position, cache, method="decode")
    )
    cache, ids = model.empty_cache(1, start + num_tokens), list(ids)
    for position in range(start + num_tokens - 1):
        logits, cache = decode(np.array([ids[position]], np.int32), np.array([position], np.int32), cache)
        if position + 1 == len(ids):
            ids.append(int(np.argmax(logits[0])))
    return ids[start:]


def test_greedy_text_is_that_of_decoding_token_by_token(generator: Generator, whole_run: Path):
    opened = open_model(whole_run)
    prompts = ["def ", "import json", "c"]
    results = generator.generate(prompts, 12, GREEDY)
    for prompt, result in zip(prompts, results, strict=True):
        ids = greedy_by_hand(opened, list(opened.tokenizer.encode(prompt)), 12)
        assert result.text == opened.tokenizer.decode(ids, continued=True)
        assert (result.prompt, result.num_tokens, result.ended_by) == (prompt, 12, "length")


def test_what_is_drawn_does_not_depend_on_the_rows_beside_it(generator: Generator):
    sampling = Sampling(temperature=1.0, top_k=50, seed=3)
    together = generator.generate(["def ", "class A"], 10, sampling, num_samples=2)
    assert len({result.text for result in together}) == 4
    assert [result.sample for result in together] == [0, 1, 0, 1]
    alone = generator.generate(["class A"], 10, sampling, num_samples=2)
    assert alone == together[2:]
    by_two = generator.generate(["def ", "class A"], 10, sampling, num_samples=2, batch_tokens=60, tokens_at_once=3)
    assert by_two == together
    assert generator.generate(["class A"], 10, Sampling(1.0, 50, seed=4))[0].text != alone[0].text


def test_text_is_given_out_piece_by_piece(generator: Generator):
    pieces: dict[int, list[str]] = {0: [], 1: []}
    counts = []
    results = generator.generate(
        ["def ", "x"],
        11,
        Sampling(temperature=1.0),
        tokens_at_once=2,
        on_text=lambda i, text: pieces[i].append(text),
        on_tokens=counts.append,
    )
    for index, result in enumerate(results):
        assert "".join(pieces[index]) == result.text
        assert len(pieces[index]) > 2
    assert sum(counts) == sum(result.num_tokens for result in results)


def test_a_stop_string_ends_one_text_and_not_the_others(generator: Generator):
    prompts = ["def ", "import json"]
    whole = generator.generate(prompts, 16, Sampling(temperature=1.0, seed=1))
    stop = whole[0].text[1:3]
    cut = generator.generate(prompts, 16, Sampling(temperature=1.0, seed=1), stops=[stop], tokens_at_once=4)
    for before, after in zip(whole, cut, strict=True):
        place = before.text.find(stop)
        assert after.text == (before.text if place < 0 else before.text[:place])
        assert after.ended_by == (before.ended_by if place < 0 else "stop")
    assert cut[0].num_tokens <= 8 < whole[0].num_tokens


def test_the_positions_of_the_model_are_filled_and_not_overrun(generator: Generator):
    assert generator.max_length == 64
    result = generator.generate(["d" * 40], 24, GREEDY, tokens_at_once=5)[0]
    assert result.num_tokens == 24 or result.ended_by == "end"
    with pytest.raises(UserError, match="has 41 tokens, and with 24 to come that is more than the model's 64"):
        generator.generate(["d" * 41], 24, GREEDY)


def test_an_empty_prompt_begins_a_document(generator: Generator):
    assert generator.encode("") == [generator.tokenizer.eod_id]
    assert generator.generate([""], 3, GREEDY)[0].num_tokens <= 3


@pytest.mark.parametrize("text", ["plain", "naïve 漢字 🙂!", "🙂🙂"])
def test_characters_wait_until_they_are_whole(text: str):
    tokenizer, stream, pieces = ByteTokenizer(), None, []
    stream = TextStream(tokenizer, [])
    for index in tokenizer.encode(text):
        pieces.append(stream.add([index]))
    assert "".join(pieces) == stream.text == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert stream.end() == ""


def test_bytes_that_are_no_text_do_not_wait_for_ever():
    stream = TextStream(ByteTokenizer(), [])
    text = stream.add([0xFF] * 20) + stream.end()
    assert text == stream.text == "\ufffd" * 20
    stream = TextStream(ByteTokenizer(), [])
    assert stream.add(list("é".encode())[:1]) == "" and stream.end() == "\ufffd"


def test_what_may_become_a_stop_string_waits():
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer, ["\n\ndef", "END"])
    assert stream.add(tokenizer.encode("a\n")) == "a"
    assert stream.add(tokenizer.encode("\nE")) == "\n\n"
    assert stream.add(tokenizer.encode("N")) == ""
    assert stream.add(tokenizer.encode("O\n\nde")) == "ENO"
    assert stream.add(tokenizer.encode("f and more")) == ""
    assert stream.stopped and stream.text == "a\n\nENO" and stream.end() == ""
    stream = TextStream(tokenizer, ["END"])
    assert stream.add(tokenizer.encode("xEN")) == "x" and stream.end() == "EN" and stream.text == "xEN"


def test_the_verb(whole_run: Path, generator: Generator, capsys: pytest.CaptureFixture):
    expected = generator.generate(["def "], 8, GREEDY)[0].text
    assert generate.main(["--checkpoint", str(whole_run), "--prompt", "def ", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out == f"def {expected}\n"
    command = ["--checkpoint", str(whole_run), "--max_new_tokens", "8", "--temperature", "1", "--seed", "5", "--json"]
    assert generate.main([*command, "--prompt", "def ", "a", "--num_samples", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [("def ", 0), ("def ", 1), ("a", 0), ("a", 1)]
    drawn = generator.generate(["def ", "a"], 8, Sampling(temperature=1.0, seed=5), num_samples=2)
    assert [line["text"] for line in lines] == [result.text for result in drawn]


def test_interactive(whole_run: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """A line is continued, one that is too long is refused and the next one goes on, the end of input leaves."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"def \n{'x' * 70}\nimport\n"))
    flags = ["--checkpoint", str(whole_run), "--interactive", "--max_new_tokens", "4"]
    assert generate.main(flags) == 0
    said = capsys.readouterr()
    assert "> def " in said.out and "> import" in said.out
    assert "latentjax.generate: the prompt 'xxx" in said.err and "xxx" not in said.out


def test_a_mesh_of_eight(whole_run: Path, generator: Generator):
    config = open_model(whole_run).config
    config.mesh.data, config.mesh.fsdp = 2, 4
    meshed = Generator(open_model(whole_run, mesh=config.mesh))
    prompts = ["def ", "import json", "class A"]
    assert meshed.generate(prompts, 6, GREEDY) == generator.generate(prompts, 6, GREEDY)


def test_prompts_files(tmp_path: Path):
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_prompts(tmp_path / "p.txt") == ["one", "two"]
    (tmp_path / "p.jsonl").write_text('"one\\nline"\n{"prompt": "two", "id": 1}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ["one\nline", "two"]
    for content, message in (("[1]\n", "p.jsonl:1: write a text"), ("{\n", "p.jsonl:1: not JSON"), ("", "no prompts")):
        (tmp_path / "p.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path / "p.jsonl")


MISTAKES = {
    "nothing to continue": [],
    "--max_new_tokens must be at least 1": ["--prompt", "a", "--max_new_tokens", "0"],
    "--num_samples would all be the same": ["--prompt", "a", "--num_samples", "2"],
    "temperature must be from 0": ["--prompt", "a", "--temperature", "-1"],
    "top_p must be above 0": ["--prompt", "a", "--top_p", "0"],
    "top_k must be 0": ["--prompt", "a", "--top_k", "-1"],
    "--stop is empty": ["--prompt", "a", "--stop", ""],
    "leave out --prompt": ["--prompt", "a", "--interactive"],
    "cannot read --prompts_file": ["--prompts_file", "no/such.txt"],
    "--prefill_tolerance must be": ["--prompt", "a", "--prefill_tolerance", "1"],
    "in generation the group mesh can be set": ["--prompt", "a", "--config.train.seed=1"],
    "is given twice": ["--prompt", "a", "--prompt", "b"],
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes(message: str, whole_run: Path):
    with pytest.raises(UserError, match=message):
        generate.main(["--checkpoint", str(whole_run), *MISTAKES[message]])
