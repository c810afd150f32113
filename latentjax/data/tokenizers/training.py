"""Training a sentencepiece model on a corpus: lossless, and the same bytes whenever the corpus is the same."""

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from latentjax.errors import UserError

# Enough for the frequent pieces of any vocabulary we train, and seconds of work.
SAMPLE_BYTES = 8_000_000
SMALLEST_VOCABULARY = 258  # the bytes, the id that is never used and the end of a document
# Texts are cut into passages of about this many characters: a sample of passages represents a corpus of few long
# documents as well as one of many short ones.
_PASSAGE_CHARACTERS = 4096
# sentencepiece keeps these two for itself and drops a passage with the second; U+0000 it warns about.
_RESERVED = str.maketrans({"\u2581": " ", "\u2585": " ", "\0": " "})


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> SentencePieceTokenizer:
    """Trains a byte-pair model with byte fallback that reproduces any text exactly.

    Id 0 is never used, id 1 ends a document, 2..257 are bytes. Line breaks and indentation are learned like letters.
    The result depends on the texts and their order only: not on the machine, its cores or the process.

    Args:
      texts: the documents; read once, with at most about `sample_bytes` of them in memory.
      vocab_size: V, number of ids.
      sample_bytes: UTF-8 bytes of passages to train on, drawn evenly from all texts.

    Raises:
      UserError: nothing to train on, or a vocabulary too large or too small for it (naming the limit).
    """
    if not SMALLEST_VOCABULARY <= vocab_size < 2**31:
        raise UserError(
            f"a tokenizer's vocabulary of {vocab_size} cannot be trained: it has {SMALLEST_VOCABULARY} ids (256 of "
            "them bytes) at least, and fewer than 2**31"
        )
    sample = _sample_passages(texts, sample_bytes)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            # sentencepiece cuts off line ends behind a passage, but keeps those within it and before it.
            sentence_iterator=iter(sample),
            model_writer=model,
            # Byte-pair encoding counts in integers. Unigram sums floats by thread, trains 20 times slower and came
            # out no shorter on source code (2.55 against 2.59 bytes per token at V = 1024).
            model_type="bpe",
            vocab_size=vocab_size,
            num_threads=1,  # recorded in the model, so it must not follow the machine
            max_sentence_length=16 * _PASSAGE_CHARACTERS,
            input_sentence_size=0,  # the sample is drawn already
            shuffle_input_sentence=False,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            split_digits=True,
            byte_fallback=True,
            character_coverage=0.9995,  # rarer characters are left to bytes
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size) from error
    return SentencePieceTokenizer(model.getvalue())


def _explain(error: RuntimeError, vocab_size: int) -> Exception:
    """Turns a complaint of the trainer into one that names our knob; passes on what it does not know."""
    message = str(error)
    if too_large := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return UserError(
            f"the tokenizer's vocabulary of {vocab_size} is too large for this corpus: "
            f"the largest that works is {too_large[1]}"
        )
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"the tokenizer's vocabulary of {vocab_size} is too small for the characters of this corpus: "
            f"the smallest that works is {too_small[1]}"
        )
    if "sentences_.empty()" in message:
        return UserError("the corpus has no text to train a tokenizer on")
    return error


def _sample_passages(texts: Iterable[str], limit: int) -> list[str]:
    """Keeps the passages with the lowest hashes of their number that fit `limit` bytes, in their order."""
    kept: list[tuple[int, int, str]] = []  # a heap with the highest hash on top
    size = 0
    for number, passage in enumerate(_passages(texts)):
        digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
        heapq.heappush(kept, (-int.from_bytes(digest, "little"), number, passage))
        size += len(passage.encode())
        while size > limit and len(kept) > 1:
            size -= len(heapq.heappop(kept)[2].encode())
    return [passage for _, _, passage in sorted(kept, key=lambda entry: entry[1])]


def _passages(texts: Iterable[str]) -> Iterator[str]:
    """Cuts texts before a line break where there is one, and anywhere in longer lines; nothing is dropped."""
    for text in texts:
        text = text.translate(_RESERVED)
        start = 0
        while start < len(text):
            end = start + _PASSAGE_CHARACTERS
            if end < len(text):
                line_break = text.rfind("\n", start + 1, end)
                end = line_break if line_break > 0 else end
            yield text[start:end]
            start = end
