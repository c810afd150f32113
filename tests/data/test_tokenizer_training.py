"""Training a tokenizer: what it learns, that it repeats itself, and which vocabularies cannot be."""

import subprocess
import sys
from pathlib import Path

import pytest
from made_tokenizers import CORPUS

from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from latentjax.data.tokenizers.training import train_sentencepiece
from latentjax.errors import UserError

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(CORPUS, 320)


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
        "from latentjax.data.tokenizers.training import train_sentencepiece as train\n"
        "from made_tokenizers import CORPUS\n"
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


@pytest.mark.parametrize("size, hint", [(5000, "largest that works is"), (260, "smallest that works is")])
def test_unsuitable_vocabulary_names_one_that_works(size, hint):
    with pytest.raises(UserError, match=hint) as caught:
        train_sentencepiece(CORPUS, size)
    limit = int(str(caught.value).split()[-1])
    assert train_sentencepiece(CORPUS, limit).vocab_size == limit


@pytest.mark.parametrize("texts", [[], ["", "\n"]])
def test_no_text_to_train_on(texts):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_sentencepiece(texts, 300)
