"""Bytes as tokens: no vocabulary to make, and nothing to lose."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from latentjax.data.tokenizers.base import Tokenizer, save_description


class ByteTokenizer(Tokenizer):
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

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] | None = None) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> bytes:
        ids = np.asarray(ids, np.int64)
        return ids[(ids >= 0) & (ids < 256)].astype(np.uint8).tobytes()

    def decode(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_description(directory, self)
