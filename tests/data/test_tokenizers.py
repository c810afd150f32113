"""Tokenizers: exact round trips, byte counts, saving, and training that repeats itself."""

import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from latentjax.data.tokenizer_training import train_sentencepiece
from latentjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, load_tokenizer, read_sentencepiece
from latentjax.errors import UserError

HERE = Path(__file__).parent
HARD_TEXTS = [
    "",
    " ",
    "\n",
    "  leading and trailing   ",
    "tabs\t\tand\r\nline\rends\n\n\n",
    "    if x:\n        return  {1:  2}\n",
    "naïve Grüße, 日本語, עברית, 🙂👩‍🚀",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A",
    "the space symbol \u2581\u2581 itself, and \u2585 and \u2047",
    "\ufeffbyte order mark, \u00a0no-break, \u3000wide, \u2028line separator",
    "control </s> <unk> <0x0A> \0 \x1b \x7f",
    "1234567890",
]
CORPUS = [
    f"def function_{n}(self, value):\n    if value > {n}:\n        return self.value + {n * 7}\n\n" for n in range(200)
]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(CORPUS, 320)


@pytest.fixture(params=["bytes", "sentencepiece"])
def tokenizer(request, trained):
    return ByteTokenizer() if request.param == "bytes" else trained


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_text_comes_back_exactly(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.bytes_per_id[ids].sum() == len(text.encode())
    assert all(type(index) is int and 0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.eod_id not in ids


def test_every_byte_and_character_comes_back(tokenizer):
    characters = [chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000]
    text = "".join(characters)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_agree_with_single_texts(tokenizer):
    for text, ids in zip(HARD_TEXTS, tokenizer.encode_batch(HARD_TEXTS), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)


def test_windows_cut_within_a_character_lose_no_byte(tokenizer):
    text = "x日y" * 5
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        assert tokenizer.decode_bytes(ids[:cut]) + tokenizer.decode_bytes(ids[cut:]) == text.encode()


def test_byte_tokenizer_is_utf8():
    assert ByteTokenizer().encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert ByteTokenizer().vocab_size == 257
    assert ByteTokenizer().bytes_per_id.tolist() == [1] * 256 + [0]


def test_end_of_document_and_foreign_ids_decode_to_nothing(tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.eod_id, *tokenizer.encode("b"), tokenizer.vocab_size + 7]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.bytes_per_id[tokenizer.eod_id] == 0
    assert tokenizer.bytes_per_id.shape == (tokenizer.vocab_size,)
    assert tokenizer.bytes_per_id.dtype == np.int32


def test_saving_and_pickling_keep_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    for copy in (load_tokenizer(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer)
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.encode(CORPUS[3]) == tokenizer.encode(CORPUS[3])


def test_training_learns_line_breaks_and_indentation(trained):
    assert trained.vocab_size == 320
    spellings = {trained.decode_bytes([index]) for index in range(trained.vocab_size)}
    assert b"    " in spellings and b"):\n" in spellings
    assert len(trained.encode("):\n        ")) == 3


def test_digits_are_single_pieces(trained):
    assert len(trained.encode("1234567")) == 7


def test_training_gives_the_same_bytes_in_another_process(trained):
    program = (
        f"import sys; sys.path += [{str(HERE)!r}, {str(HERE.parents[1])!r}]\n"
        "from latentjax.data.tokenizer_training import train_sentencepiece as train\n"
        "from test_tokenizers import CORPUS\n"
        "print(train(CORPUS, 320).fingerprint)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == trained.fingerprint
    assert train_sentencepiece([text.upper() for text in CORPUS], 320).fingerprint != trained.fingerprint


def test_long_lines_are_learned_from():
    # One line of 280 kB: longer than what sentencepiece leaves out unless told otherwise.
    line = "lorem ipsum dolor sit amet. " * 10_000
    tokenizer = train_sentencepiece([line], 285)
    assert len(tokenizer.encode(line)) < len(line) / 2


def test_a_reserved_character_does_not_drop_its_passage():
    tokenizer = train_sentencepiece(["wordword wordword \u2585 wordword \u2581 \0"], 265)
    assert len(tokenizer.encode("wordword")) <= 4


def test_the_sample_is_bounded_and_spread_over_the_corpus():
    texts = [f"{letter * 20} " * 40 for letter in "abcdefghijklmnopqrstuvwxyz" for _ in range(40)]
    tokenizer = train_sentencepiece(iter(texts), 380, sample_bytes=100_000)  # of 870 kB
    # Letters from all of the corpus are learned, not of its beginning only.
    known = [letter for letter in "abcdefghijklmnopqrstuvwxyz" if len(tokenizer.encode(letter * 20)) <= 10]
    assert len(known) == 26


@pytest.mark.parametrize("size, hint", [(5000, "largest that works is"), (120, "smallest that works is")])
def test_unsuitable_vocabulary_names_one_that_works(size, hint):
    with pytest.raises(UserError, match=hint) as caught:
        train_sentencepiece(CORPUS, size)
    limit = int(str(caught.value).split()[-1])
    assert train_sentencepiece(CORPUS, limit).vocab_size == limit


@pytest.mark.parametrize("texts", [[], ["", "\n"]])
def test_no_text_to_train_on(texts):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_sentencepiece(texts, 300)


def foreign_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=60, minloglevel=2, **options
    )
    return model.getvalue()


def test_a_model_with_a_dummy_prefix_gives_plain_text_back():
    tokenizer = SentencePieceTokenizer(foreign_model())
    ids = tokenizer.encode("return self.value")
    assert tokenizer.decode_bytes(ids) == b"return self.value"
    assert tokenizer.bytes_per_id[ids].sum() == len(b" return self.value")
    assert tokenizer.eod_id == 2


def test_a_model_that_cannot_end_documents_is_refused():
    with pytest.raises(UserError, match="mine.model has no end-of-sentence piece"):
        SentencePieceTokenizer(foreign_model(eos_id=-1), "mine.model")


def test_damaged_and_missing_tokenizers_are_named(trained, tmp_path):
    with pytest.raises(UserError, match="cannot read the tokenizer .*absent.model"):
        read_sentencepiece(tmp_path / "absent.model")
    (tmp_path / "noise.model").write_bytes(b"\x07noise" * 9)
    with pytest.raises(UserError, match="noise.model is not a sentencepiece model"):
        read_sentencepiece(tmp_path / "noise.model")
    with pytest.raises(UserError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    trained.save(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    train_sentencepiece(CORPUS, 300).save(other)
    (other / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="fingerprints differ"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": "runes", "fingerprint": ""}')
    with pytest.raises(UserError, match="'runes'"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json is damaged"):
        load_tokenizer(tmp_path)
