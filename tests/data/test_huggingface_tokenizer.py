"""Hugging Face tokenizers: agreement with the library itself, what ends a document, and which files are refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import CORPUS, HARD_TEXTS, byte_level_file, llama_file, unigram_file
from tokenizers import Tokenizer, decoders

from latentjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from latentjax.data.tokenizers.saved import load_tokenizer, read_tokenizer
from latentjax.errors import UserError

HERE = Path(__file__).parent
FILES = {
    "byte-level": (byte_level_file, "<|endoftext|>"),
    "byte-level, NFC": (lambda: byte_level_file("NFC"), "<|endoftext|>"),
    "byte-level with a dummy prefix": (lambda: byte_level_file("", True), "<|endoftext|>"),
    "LLaMA": (llama_file, "</s>"),
    "Metaspace, always": (lambda: llama_file("always"), "</s>"),
    "Metaspace, first": (lambda: llama_file("first"), "</s>"),
    "Metaspace, never": (lambda: llama_file("never"), "</s>"),
    "Unigram": (unigram_file, "</s>"),
}
LINES = "def f(x):\nreturn  x\nx = f(1)    + 2\n"


@pytest.fixture(scope="module", params=list(FILES))
def both(request):
    """A tokenizer and the library's own from the same file."""
    make, eod_token = FILES[request.param]
    return HuggingFaceTokenizer(make(), eod_token), Tokenizer.from_str(make().decode())


def library_ids(library: Tokenizer, text: str) -> list[int] | None:
    """The library's ids of a text; None where these do not give the text back, or where we mean to differ.

    That is text that spells a control token, and a space that it puts behind added tokens as it does before a document.
    """
    ids = library.encode(text, add_special_tokens=False).ids
    decoded = library.decode(ids, skip_special_tokens=False)
    if library.encode("a", add_special_tokens=False).tokens[0] != "a":  # a dummy prefix
        if any(token.content in text for token in library.get_added_tokens_decoder().values()):
            return None
        if isinstance(library.decoder, decoders.ByteLevel):  # it leaves the prefix, which a space in front replaces
            decoded = decoded[1:] if not text.startswith(" ") else ""
    return ids if decoded == text and text and "<" not in text else None


def change(file: bytes, **changes) -> bytes:
    """A tokenizer.json with some of its parts replaced; those of the model as `model={...}`."""
    pipeline = json.loads(file)
    pipeline["model"] |= changes.pop("model", {})
    return json.dumps(pipeline | changes).encode()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CORPUS[:3], *HARD_TEXTS, "    ", "  "]) | st.text(), max_size=4).map("".join))
def test_text_is_encoded_as_the_library_does_where_that_gives_it_back(both, text):
    tokenizer, library = both
    ids = library_ids(library, text)
    if ids is not None:
        assert tokenizer.encode(text) == tokenizer.encode_batch([text])[0].tolist() == ids


def test_words_are_encoded_as_the_library_does(both):
    tokenizer, library = both
    words = [" ".join(text.split()) for text in CORPUS] + [HARD_TEXTS[5], HARD_TEXTS[7]]
    expected = [library_ids(library, text) for text in words]
    assert None not in expected
    assert [ids.tolist() for ids in tokenizer.encode_batch(words)] == expected


@pytest.mark.parametrize("file, eod_token", [(byte_level_file(), "<|endoftext|>"), (llama_file(), "</s>")])
def test_whitespace_tokens_are_used(file, eod_token):
    tokenizer = HuggingFaceTokenizer(file, eod_token)
    run = next(index for index in range(tokenizer.vocab_size) if tokenizer.decode_bytes([index], True) == b"    ")
    assert run in tokenizer.encode("x    y")


def test_a_document_cut_behind_a_line_break_is_tokenised_as_if_it_were_whole():
    for file in (byte_level_file(), byte_level_file("NFC"), byte_level_file("", True)):
        tokenizer = HuggingFaceTokenizer(file, "<|endoftext|>")
        pieces = tokenizer.encode_batch([LINES] * 3, [False, True, True])
        assert np.concatenate(pieces).tolist() == tokenizer.encode(LINES * 3)


def test_text_that_spells_a_control_token_is_text_and_its_surroundings_stay_as_they_are():
    tokenizer = HuggingFaceTokenizer(llama_file(), "</s>")
    library = Tokenizer.from_str(llama_file().decode())
    library.encode_special_tokens = True
    # The merges of this vocabulary lead to the control token itself: the library's own switch does not help.
    assert tokenizer.eod_id in library.encode("return</s>value", add_special_tokens=False).ids
    ids = tokenizer.encode("return</s>value")
    assert tokenizer.eod_id not in ids
    assert tokenizer.decode(ids) == "return</s>value"
    assert ids[: len(tokenizer.encode("return"))] == tokenizer.encode("return")
    many = "x</s>" * 5000
    assert tokenizer.decode(tokenizer.encode(many)) == many


def test_added_tokens_keep_the_space_around_them():
    tokenizer = HuggingFaceTokenizer(byte_level_file(), "<|endoftext|>")
    library = Tokenizer.from_str(byte_level_file().decode())
    assert library.decode(library.encode("a \n<tool> b").ids) != "a \n<tool> b"  # lstrip, rstrip
    ids = tokenizer.encode("a \n<tool> b")
    assert library.token_to_id("<tool>") in ids
    assert tokenizer.decode(ids) == "a \n<tool> b"


def test_settings_for_batches_of_a_model_are_switched_off():
    file = change(
        byte_level_file(),
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 1,
            "pad_type_id": 0,
            "pad_token": "<|padding|>",
        },
        model={"dropout": 0.9},
    )
    tokenizer = HuggingFaceTokenizer(file, "<|endoftext|>")
    plain = HuggingFaceTokenizer(byte_level_file(), "<|endoftext|>")
    assert tokenizer.encode(CORPUS[0]) == plain.encode(CORPUS[0])
    assert [ids.tolist() for ids in tokenizer.encode_batch(CORPUS[:3])] == [plain.encode(text) for text in CORPUS[:3]]
    assert tokenizer.fingerprint != plain.fingerprint


def test_the_vocabulary_ends_behind_its_highest_id():
    tokenizer = HuggingFaceTokenizer(byte_level_file(), "<|endoftext|>")
    assert tokenizer.vocab_size == 320 + 7 + 1
    assert tokenizer.bytes_per_id[320:].tolist() == [8, 7, 6, 5, 4, 3, 2, len("<tool>")]
    assert tokenizer.bytes_per_id[:2].tolist() == [0, 0]
    other = HuggingFaceTokenizer(byte_level_file(), "<|padding|>")
    assert (other.eod_id, other.fingerprint == tokenizer.fingerprint) == (1, False)


def test_bytes_of_a_damaged_character_are_kept():
    tokenizer = HuggingFaceTokenizer(llama_file(), "</s>")
    ids = tokenizer.encode("🙂")
    assert tokenizer.decode_bytes(ids[:-1]) == "🙂".encode()[:-1]
    assert tokenizer.decode(ids[:-1]) == "\ufffd"


@pytest.mark.parametrize(
    "name, content, eod_id",
    [
        ("tokenizer_config.json", {"eos_token": "<|padding|>"}, 1),
        ("tokenizer_config.json", {"eos_token": {"content": "<|padding|>", "lstrip": False}}, 1),
        ("tokenizer_config.json", {"eos_token": None}, 0),
        ("special_tokens_map.json", {"eos_token": {"content": "<|padding|>"}}, 1),
        ("generation_config.json", {"eos_token_id": [1, 0]}, 1),
        ("config.json", {"eos_token_id": 1}, 1),
        ("config.json", ["unrelated"], 0),
        ("unrelated.json", {"eos_token": "<|padding|>"}, 0),
    ],
)
def test_the_end_of_document_is_found_beside_the_file(tmp_path, name, content, eod_id):
    (tmp_path / "tokenizer.json").write_bytes(byte_level_file())
    (tmp_path / name).write_text(json.dumps(content))
    assert read_tokenizer(tmp_path).eod_id == eod_id
    assert read_tokenizer(tmp_path / "tokenizer.json").eod_id == eod_id
    assert read_tokenizer(tmp_path, "<|endoftext|>").eod_id == 0


def test_an_end_of_document_that_cannot_be_found_is_asked_for(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_level_file())
    with pytest.raises(UserError, match=r"data.eod_token: .*tokenizer.json has no token '<eos>' to end documents with"):
        read_tokenizer(path, "<eos>")
    path.write_bytes(byte_level_file().replace(b"<|endoftext|>", b"<|fin|>"))
    with pytest.raises(UserError, match="it has none of the usual ones: set data.eod_token"):
        read_tokenizer(path)
    path.write_bytes(byte_level_file().replace(b"<|padding|>", b"<eos>"))
    with pytest.raises(UserError, match=r"it has <\|endoftext\|> and <eos>: set data.eod_token"):
        read_tokenizer(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is damaged: it is not JSON"):
        read_tokenizer(path)


WORD_PIECE = {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "vocab": {"<unk>": 0}}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "tokenizer.json is damaged: it is not JSON"),
        (b"\xff\xfe", "tokenizer.json is damaged: it is not JSON"),
        (b"[1]", "is not a Hugging Face tokenizer.json: it has no model"),
        (b'{"model": {"type": "BPE"}}', "is not a Hugging Face tokenizer.json: it has no model"),
        (change(byte_level_file(), added_tokens=[{"id": 0}]), "is not a Hugging Face tokenizer.json"),
        (change(byte_level_file(), normalizer={"type": "Rot13"}), "is not a Hugging Face tokenizer.json: .*"),
        (change(byte_level_file(), model=WORD_PIECE), "the model WordPiece"),
        (change(byte_level_file(), model={"end_of_word_suffix": "</w>"}), "marks on parts of words"),
        (change(byte_level_file(), decoder={"type": "BPEDecoder", "suffix": "</w>"}), "the decoder BPEDecoder"),
        (change(byte_level_file(), decoder=None, pre_tokenizer=None), "no decoder for bytes or spaces"),
        (change(byte_level_file(), pre_tokenizer={"type": "Whitespace"}), "the pre-tokenizer Whitespace, which drops"),
        (change(llama_file(), decoder={"type": "Strip", "content": " ", "start": 2, "stop": 0}), "strips more than"),
        (change(llama_file(), normalizer={"type": "Prepend", "prepend": "x"}), "puts 'x' before every text"),
    ],
)
def test_unusable_files_are_refused(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_tokenizer(tmp_path, "<unk>" if b"WordPiece" in content else "")
    assert "\n" not in str(caught.value)


def test_a_token_for_unknown_text_does_not_end_documents():
    letters = change(llama_file(), model={"byte_fallback": False})
    with pytest.raises(UserError, match="<unk> also stands for text outside the vocabulary"):
        HuggingFaceTokenizer(letters, "<unk>")
    assert HuggingFaceTokenizer(llama_file(), "<unk>").encode("日 <unk>")
    # Without byte fallback unknown characters are lost, and marked as lost.
    tokenizer = HuggingFaceTokenizer(letters, "</s>")
    assert tokenizer.decode(tokenizer.encode("self.日value")) == "self.\ufffdvalue"


def test_a_decoder_is_told_from_the_pre_tokenizer_where_there_is_none():
    for file, eod_token in ((byte_level_file(), "<|endoftext|>"), (llama_file("always"), "</s>")):
        tokenizer = HuggingFaceTokenizer(change(file, decoder=None), eod_token)
        assert tokenizer.decode(tokenizer.encode("  naïve 日本語")) == "  naïve 日本語"


def test_older_spellings_of_the_dummy_prefix_are_known():
    older = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    decoder = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    tokenizer = HuggingFaceTokenizer(change(llama_file("always"), pre_tokenizer=older, decoder=decoder), "</s>")
    assert tokenizer.encode("return  1") == HuggingFaceTokenizer(llama_file("always"), "</s>").encode("return  1")
    without = change(llama_file("always"), pre_tokenizer=older | {"add_prefix_space": False}, decoder=decoder)
    assert HuggingFaceTokenizer(without, "</s>").encode("a") == tokenizer.encode_batch(["a"], [True])[0].tolist()


def test_batches_are_encoded_on_one_thread_whatever_the_environment_says():
    program = (
        f"import sys; sys.path += [{str(HERE)!r}, {str(HERE.parents[1])!r}]\n"
        "import os\n"
        "from made_tokenizers import CORPUS, byte_level_file\n"
        "from latentjax.data.tokenizers.huggingface import HuggingFaceTokenizer\n"
        "count = lambda: len(os.listdir('/proc/self/task'))\n"
        "tokenizer = HuggingFaceTokenizer(byte_level_file(), '<|endoftext|>')\n"
        "before = count()\n"
        "tokenizer.encode_batch(CORPUS)\n"
        "print(count() - before, os.environ.get('TOKENIZERS_PARALLELISM'))"
    )
    for setting in (None, "true"):
        environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
        environment |= {} if setting is None else {"TOKENIZERS_PARALLELISM": setting}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.split() == ["0", str(setting)]


def test_a_saved_tokenizer_has_the_files_that_transformers_reads(tmp_path):
    tokenizer = HuggingFaceTokenizer(byte_level_file(), "<|padding|>")
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == byte_level_file()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (config["tokenizer_class"], config["eos_token"]) == ("PreTrainedTokenizerFast", "<|padding|>")
    (tmp_path / "tokenizer.json").write_bytes(change(byte_level_file(), normalizer={"type": "NFC"}))
    with pytest.raises(UserError, match="fingerprints differ"):
        load_tokenizer(tmp_path)
