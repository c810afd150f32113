"""Tokenizers in Hugging Face's tokenizer.json format: byte-level (GPT-2 and on) and sentencepiece-like (LLaMA)."""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import tokenizers

from latentjax.data.tokenizers.base import Tokenizer, save_description
from latentjax.data.tokenizers.definition import BYTE_TOKENS, Definition, read_definition
from latentjax.errors import UserError, brief

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

_PARALLELISM = "TOKENIZERS_PARALLELISM"
_environment = threading.Lock()


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library, given by the bytes of its tokenizer.json.

    Text is encoded as the library does it with these differences. Control tokens come from nowhere: none are put
    around a text, and text that spells one ("</s>") stays text. A dummy prefix is put before every document, even one
    that begins with a space, and nowhere else. Added tokens do not swallow the white space around them. So every text
    comes back, except as far as the vocabulary lacks characters or a normalizer changes them.
    """

    kind = "huggingface"

    def __init__(self, definition: bytes, eod_token: str, source: str = TOKENIZER_FILE):
        """Loads a tokenizer.json.

        Args:
          definition: its content.
          eod_token: the token that ends documents.
          source: names the file in errors.

        Raises:
          UserError: not a tokenizer.json, no such token, or one that does not spell text exactly.
        """
        self.definition, self.eod_token = definition, eod_token
        read = read_definition(definition, eod_token, source)
        try:
            self._encoder = tokenizers.Tokenizer.from_str(read.pipeline)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{source} is not a Hugging Face tokenizer.json: {brief(error)}") from error
        # Text that spells a special token is split like other text.
        self._encoder.encode_special_tokens = True
        vocabulary = self._encoder.get_vocab()
        if eod_token not in vocabulary:
            raise UserError(f"data.eod_token: {source} has no token {eod_token!r} to end documents with")
        self.eod_id = vocabulary[eod_token]
        self.vocab_size = max(vocabulary.values()) + 1
        self._unknown_id = vocabulary.get(read.unknown_token, -1)
        if self._unknown_id == self.eod_id and not read.spells_all:
            raise UserError(
                f"{source}: the token {eod_token} also stands for text outside the vocabulary: name another in "
                "data.eod_token"
            )
        # In the vocabulary's own letters where it has one for a space, as a space might join an added token behind it.
        self._prefix = (read.space_symbol or " ") if read.has_dummy_prefix else ""
        self._bytes_of_id, self._is_control_V = self._spell(vocabulary, read)
        # What text can look like for which the library gives ids that stand for other text.
        self._misleading = (read.space_symbol, "<0x") if read.space_symbol else ()
        self._is_misleading_V = self._is_control_V.copy()
        if read.space_symbol:
            self._is_misleading_V[[vocabulary[token] for token in BYTE_TOKENS if token in vocabulary]] = True
        self._symbol = read.space_symbol if read.spells_all else ""  # else there is nothing to spell it with
        self._symbol_ids = [vocabulary[BYTE_TOKENS[byte]] for byte in self._symbol.encode()]

    def _spell(self, vocabulary: dict[str, int], read: Definition) -> tuple[list[bytes], np.ndarray]:
        """Returns the bytes of each id and (V,) bool: which ids are control tokens, never the encoding of text."""
        spelled = [b""] * self.vocab_size
        for token, index in vocabulary.items():
            spelled[index] = read.spell(token)
        is_control_V = np.zeros(self.vocab_size, bool)
        normalizer = self._encoder.normalizer
        for index, token in self._encoder.get_added_tokens_decoder().items():
            # A normalised token is looked for in normalised text: what it is found for is what it stands for.
            content = normalizer.normalize_str(token.content) if token.normalized and normalizer else token.content
            content = content.replace(read.space_symbol, " ") if read.space_symbol else content
            spelled[index] = b"" if token.special else content.encode()
            is_control_V[index] = token.special
        if self._unknown_id >= 0:
            spelled[self._unknown_id] = "\ufffd".encode()
        spelled[self.eod_id] = b""
        is_control_V[self.eod_id] = True
        return spelled, is_control_V

    @cached_property
    def bytes_per_id(self) -> np.ndarray:
        return np.array([len(spelling) for spelling in self._bytes_of_id], np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.definition + b"end of document %d" % self.eod_id).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encode_exactly(text, False)

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] | None = None) -> list[np.ndarray]:
        goes_on = [False] * len(texts) if continued is None else continued
        prefixed = [text if on or not text else self._prefix + text for text, on in zip(texts, goes_on, strict=True)]
        with _one_thread():
            encodings = self._encoder.encode_batch_fast(prefixed, add_special_tokens=False)
        ends = np.cumsum([0, *map(len, encodings)])
        all_ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), np.int32, ends[-1])
        arrays = [all_ids[start:end] for start, end in pairwise(ends.tolist())]
        # Rare: text that came out as a control token, or might have come out as something else that it is not.
        control = np.flatnonzero(self._is_control_V[all_ids])
        amiss: set[int] = set((np.searchsorted(ends, control, "right") - 1).tolist())
        for sign in self._misleading:
            amiss |= {number for number, text in enumerate(texts) if sign in text}
        for number in amiss:
            arrays[number] = np.array(self._encode_exactly(texts[number], goes_on[number]), np.int32)
        return arrays

    def _encode_exactly(self, text: str, continued: bool) -> list[int]:
        first, *others = text.split(self._symbol) if self._symbol else [text]
        ids = self._encode_literally(first if continued or not text else self._prefix + first)
        for part in others:
            ids += self._symbol_ids + self._encode_literally(part)
        return ids

    def _encode_literally(self, text: str) -> list[int]:
        """Encodes text without the symbol of a space; where it spells a control or byte token it is cut within that.

        BPE can have merges that lead to such a token (LLaMA's: "</" and "s>"), Unigram takes it for any other piece.
        """
        encoding = self._encoder.encode(text, add_special_tokens=False)
        ids = encoding.ids
        places = np.flatnonzero(self._is_misleading_V[np.array(ids, np.int64)]).tolist()
        if not places:
            return ids
        offsets, tokens = encoding.offsets, encoding.tokens
        cuts = []
        for place in places:
            start, stop = offsets[place]
            # Unknown characters and the bytes of a character are rightly such tokens.
            is_right = ids[place] == self._unknown_id or not self._is_control_V[ids[place]]
            if stop - start > 1 and (text[start:stop] == tokens[place] or not is_right):
                cuts.append(start + 1)
        if not cuts:
            return ids
        parts = (text[start:stop] for start, stop in pairwise([0, *cuts, len(text)]))
        return [index for part in parts for index in self._encode_literally(part)]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> bytes:
        known = (index for index in np.asarray(ids).tolist() if 0 <= index < self.vocab_size)
        spelled = b"".join(self._bytes_of_id[index] for index in known)
        return spelled[1:] if self._prefix and not continued and spelled.startswith(b" ") else spelled

    def decode(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> str:
        return self.decode_bytes(ids, continued).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer so that `transformers`' AutoTokenizer loads it from the directory, too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TOKENIZER_FILE).write_bytes(self.definition)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": self.eod_token,
            "clean_up_tokenization_spaces": False,
        }
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_description(directory, self, eod_token=self.eod_token)

    def __reduce__(self):
        return type(self), (self.definition, self.eod_token)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the library's batch call from starting threads: parallelism is over documents, by processes.

    It asks the environment at every call, so that is set for the length of one, and the user's own choice for other
    tokenizers stands again afterwards.
    """
    with _environment:
        before = os.environ.get(_PARALLELISM)
        os.environ[_PARALLELISM] = "false"
        try:
            yield
        finally:
            if before is None:
                del os.environ[_PARALLELISM]
            else:
                os.environ[_PARALLELISM] = before
