"""sentencepiece models: trained here, or a .model file made elsewhere."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece

from latentjax.data.tokenizers.base import SPACE_SYMBOL, Tokenizer, save_description
from latentjax.errors import UserError, brief

MODEL_FILE = "tokenizer.model"

# A message of a serialised model that comes twice is merged, and the later value holds. This one is
# normalizer_spec { add_dummy_prefix: false }, so a model with it behind is the same model without a dummy prefix.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Piece:
    """One entry of a vocabulary.

    Attributes:
      text: with real spaces.
      score: of two pieces that could be joined, the one of the higher score is.
      kind: normal, unknown, control, byte or unused.
    """

    text: str
    score: float
    kind: str


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, given by the bytes of its file.

    Models made by `train_sentencepiece` round-trip every text. A model made elsewhere does so as far as it was trained
    to: one without byte fallback loses unknown characters, one that normalises writes normalised text.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, eod_token: str = "", source: str = MODEL_FILE):
        """Loads `model`; `source` names it in errors.

        Args:
          eod_token: the control piece that ends documents; "" is the model's end of sentence.

        Raises:
          UserError: not a sentencepiece model, or one with no such piece to end documents with.
        """
        self._model = model
        self._processor = _load(model, source)
        self.vocab_size = self._processor.vocab_size()
        self.eod_id = self._find_eod(eod_token, source)
        try:
            self._bytes_of_id = [self._spell(index) for index in range(self.vocab_size)]
        except ValueError as error:  # a piece that is no text, or a byte's that names none
            raise UserError(f"{source} is not a sentencepiece model: {brief(error)}") from error
        # A model with a dummy prefix puts a space before every text; decoding takes it away again.
        first = self._processor.encode("a")
        self.has_dummy_prefix = bool(first) and self._bytes_of_id[first[0]].startswith(b" ")
        self._continuing = _load(model + _NO_DUMMY_PREFIX, source) if self.has_dummy_prefix else self._processor
        byte_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        self._space_symbol_ids = byte_ids if all(map(self._processor.is_byte, byte_ids)) else None

    def _find_eod(self, token: str, source: str) -> int:
        if not token:
            index = self._processor.eos_id()
            if not 0 <= index < self.vocab_size:
                raise UserError(
                    f"{source} has no end-of-sentence piece, which must stand between documents: name another "
                    "control piece in data.eod_token"
                )
            return index
        index = self._processor.piece_to_id(token)
        if self._processor.id_to_piece(index) != token or not self._processor.is_control(index):
            raise UserError(f"data.eod_token: {source} has no control piece {token!r} to end documents with")
        return index

    def _spell(self, index: int) -> bytes:
        piece = self._processor.id_to_piece(index)
        if self._processor.is_byte(index):
            return bytes([int(piece[3:5], 16)])  # <0xE2>
        if self._processor.is_control(index) or self._processor.is_unused(index):
            return b""
        if self._processor.is_unknown(index):
            return "\ufffd".encode()
        return piece.replace(SPACE_SYMBOL, " ").encode()

    def pieces(self) -> list[Piece]:
        """Returns the vocabulary, by id."""
        processor = self._processor
        tests = {
            "unknown": processor.is_unknown,
            "control": processor.is_control,
            "byte": processor.is_byte,
            "unused": processor.is_unused,
        }
        return [
            Piece(
                processor.id_to_piece(index).replace(SPACE_SYMBOL, " "),
                processor.get_score(index),
                next((kind for kind, holds in tests.items() if holds(index)), "normal"),
            )
            for index in range(self.vocab_size)
        ]

    @cached_property
    def bytes_per_id(self) -> np.ndarray:
        return np.array([len(spelling) for spelling in self._bytes_of_id], np.int32)

    @property
    def fingerprint(self) -> str:
        chosen = b"" if self.eod_id == self._processor.eos_id() else b"end of document %d" % self.eod_id
        return hashlib.sha256(self._model + chosen).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self._encode(text, False).tolist()

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] | None = None) -> list[np.ndarray]:
        goes_on = [False] * len(texts) if continued is None else continued
        return [self._encode(text, on) for text, on in zip(texts, goes_on, strict=True)]

    def _encode(self, text: str, continued: bool) -> np.ndarray:
        processor = self._continuing if continued else self._processor
        if self._space_symbol_ids is None or SPACE_SYMBOL not in text:
            return processor.encode(text, return_type="numpy")
        first, *others = text.split(SPACE_SYMBOL)
        arrays = [processor.encode(first, return_type="numpy")]
        for part in others:
            arrays += [np.array(self._space_symbol_ids), self._continuing.encode(part, return_type="numpy")]
        return np.concatenate(arrays).astype(np.int32)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> bytes:
        known = (index for index in np.asarray(ids).tolist() if 0 <= index < self.vocab_size)
        spelled = b"".join(self._bytes_of_id[index] for index in known)
        return spelled[1:] if self.has_dummy_prefix and not continued and spelled.startswith(b" ") else spelled

    def decode(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> str:
        return self.decode_bytes(ids, continued).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MODEL_FILE).write_bytes(self._model)
        save_description(directory, self, eod_token=self._processor.id_to_piece(self.eod_id))

    def __reduce__(self):
        return type(self), (self._model, self._processor.id_to_piece(self.eod_id))


def _load(model: bytes, source: str) -> sentencepiece.SentencePieceProcessor:
    try:
        # One thread: parallelism is over documents, by processes.
        processor = sentencepiece.SentencePieceProcessor(model_proto=model, num_threads=1)
        processor.vocab_size()
    except RuntimeError as error:
        raise UserError(f"{source} is not a sentencepiece model") from error
    return processor
