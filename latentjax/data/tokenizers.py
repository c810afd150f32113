"""Tokenizers: text to token ids and back without losing a byte.

Each kind offers the same interface (`Tokenizer`). Ids decode through a table of the bytes each one stands for, so that
`bytes_per_id`, which bits per byte are counted with, agrees with what `decode` writes by construction.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece

from latentjax.errors import UserError

DESCRIPTION_FILE = "tokenizer.json"
MODEL_FILE = "tokenizer.model"

# What sentencepiece writes for a space inside a piece. A text that itself holds this character would come back with a
# space in its place, so it is spelled in bytes instead.
_SPACE_SYMBOL = "\u2581"


class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are in [0, vocab_size)."""

    kind: str
    vocab_size: int
    eod_id: int  # end of document: follows every document of a token store, and is never the encoding of text

    @property
    def bytes_per_id(self) -> np.ndarray:
        """(V,) int32: how many UTF-8 bytes of text each id stands for; 0 for end of document and control ids."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all that determines the ids; equal for equal tokenizers."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without an end of document."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text as an int32 array of its own length."""

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the UTF-8 bytes of `ids`, which may begin or end within a character."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; a byte that is part of no whole character becomes U+FFFD."""

    def save(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` reads into an existing directory."""


class ByteTokenizer:
    """Ids 0..255 are the bytes of UTF-8; 256 ends a document."""

    kind = "bytes"
    vocab_size = 257
    eod_id = 256

    @cached_property
    def bytes_per_id(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(b"latentjax bytes tokenizer, end of document 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        _save_description(Path(directory), self)


class SentencePieceTokenizer:
    """A sentencepiece model, given by the bytes of its file.

    Models made by `train_sentencepiece` round-trip every text. A model made elsewhere does so as far as it was trained
    to: one without byte fallback loses unknown characters, one that normalises writes normalised text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, source: str = MODEL_FILE):
        """Loads `model`; `source` names it in errors.

        Raises:
          UserError: not a sentencepiece model, or one with no end-of-sentence piece to end documents with.
        """
        self._model = model
        try:
            # One thread: parallelism is over documents, by processes.
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model, num_threads=1)
            self.vocab_size = self._processor.vocab_size()
        except RuntimeError as error:
            raise UserError(f"{source} is not a sentencepiece model") from error
        self.eod_id = self._processor.eos_id()
        if not 0 <= self.eod_id < self.vocab_size:
            raise UserError(f"{source} has no end-of-sentence piece, which must stand between documents")
        self._bytes_of_id = [self._spell(index) for index in range(self.vocab_size)]
        # A model with a dummy prefix puts a space before every text; decoding takes it away again.
        first = self._processor.encode("a")
        self._has_dummy_prefix = bool(first) and self._bytes_of_id[first[0]].startswith(b" ")
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_SYMBOL.encode()]
        self._space_symbol_ids = byte_ids if all(map(self._processor.is_byte, byte_ids)) else None

    def _spell(self, index: int) -> bytes:
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # <0xE2>
        if self._processor.is_control(index) or self._processor.is_unused(index):
            return b""
        if self._processor.is_unknown(index):
            return "\ufffd".encode()
        return piece.replace(_SPACE_SYMBOL, " ").encode()

    @cached_property
    def bytes_per_id(self) -> np.ndarray:
        return np.array([len(spelling) for spelling in self._bytes_of_id], np.int32)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> np.ndarray:
        if self._space_symbol_ids is None or _SPACE_SYMBOL not in text:
            return self._processor.encode(text, return_type="numpy")
        parts = [self._processor.encode(part, return_type="numpy") for part in text.split(_SPACE_SYMBOL)]
        symbol = np.array(self._space_symbol_ids, np.int32)
        return np.concatenate([parts[0], *(ids for part in parts[1:] for ids in (symbol, part))])

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        spelled = b"".join(self._bytes_of_id[index] for index in np.asarray(ids).tolist() if index < self.vocab_size)
        return spelled[1:] if self._has_dummy_prefix and spelled.startswith(b" ") else spelled

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        (Path(directory) / MODEL_FILE).write_bytes(self._model)
        _save_description(Path(directory), self)

    def __reduce__(self):
        return type(self), (self._model,)


def _save_description(directory: Path, tokenizer: Tokenizer) -> None:
    description = {"kind": tokenizer.kind, "fingerprint": tokenizer.fingerprint}
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def read_sentencepiece(path: str | Path) -> SentencePieceTokenizer:
    """Loads a sentencepiece .model file.

    Raises:
      UserError: no such file, or not a usable model.
    """
    try:
        model = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from error
    return SentencePieceTokenizer(model, str(path))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads the tokenizer that `save` put into a directory, such as a token store.

    Raises:
      UserError: it is missing, of an unknown kind, or not the one that was saved.
    """
    path = Path(directory) / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_text())
        kind, fingerprint = description["kind"], description["fingerprint"]
    except OSError as error:
        raise UserError(f"cannot read the tokenizer's {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it does not describe a tokenizer") from error
    if kind not in (ByteTokenizer.kind, SentencePieceTokenizer.kind):
        raise UserError(f"{path} names a tokenizer kind {kind!r}, which this version does not know")
    tokenizer = ByteTokenizer() if kind == ByteTokenizer.kind else read_sentencepiece(path.parent / MODEL_FILE)
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{path} does not belong to the tokenizer beside it: the fingerprints differ")
    return tokenizer
