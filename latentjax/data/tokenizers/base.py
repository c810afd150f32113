"""What every tokenizer offers, and what its kinds share.

Ids decode through a table of the bytes each one stands for, so that `bytes_per_id`, which bits per byte are counted
with, agrees with what `decode` writes by construction.

A long document is tokenised in pieces, and a window begins in the middle of one. Some vocabularies put a space before
every text (the dummy prefix), which is right at the beginning of a document only: whoever encodes or decodes a later
stretch says so with `continued`. The ids of a document's pieces, joined, decode to the document.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentjax.errors import UserError

# Beside the tokenizer's own files, in a directory that `save` wrote.
DESCRIPTION_FILE = "latentjax_tokenizer.json"

# What sentencepiece writes for a space inside a piece. A text that itself holds this character would come back with a
# space in its place, so it is spelled in bytes instead.
SPACE_SYMBOL = "\u2581"


class Tokenizer(Protocol):
    """What every tokenizer offers. Ids are in [0, vocab_size)."""

    kind: str
    vocab_size: int
    eod_id: int  # end of document: follows every document of a token store, and is never the encoding of text

    @property
    def bytes_per_id(self) -> np.ndarray:
        """(V,) int32: how many UTF-8 bytes of text each id stands for; 0 for end of document and control ids."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all that determines the ids; equal for equal tokenizers."""
        ...

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, a document or its beginning, without an end of document."""
        ...

    def encode_batch(self, texts: Sequence[str], continued: Sequence[bool] | None = None) -> list[np.ndarray]:
        """Returns the ids of each text as an int32 array of its own length; works on one thread.

        Args:
          continued: for each text whether it goes on in the middle of a document; none does if left out.
        """
        ...

    def decode_bytes(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> bytes:
        """Returns the UTF-8 bytes of `ids`, which may begin or end within a character.

        Args:
          continued: whether the ids are from the middle of a document, not from its beginning.
        """
        ...

    def decode(self, ids: Sequence[int] | np.ndarray, continued: bool = False) -> str:
        """Returns the text of `ids`; a byte that is part of no whole character becomes U+FFFD."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes what `load_tokenizer` reads into a directory, which is made if it is not there."""


def save_description(directory: Path, tokenizer: Tokenizer, **details: Any) -> None:
    """Writes what `load_tokenizer` builds and checks a tokenizer by; `details` are its kind's own."""
    description = {
        "kind": tokenizer.kind,
        "fingerprint": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        **details,
    }
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n")


def check_ids(ids: np.ndarray, tokenizer: Tokenizer, source: str) -> None:
    """Checks ids that came with a corpus; `source` says where they stand.

    Raises:
      UserError: one of them is not in the tokenizer's vocabulary.
    """
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        place = int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size)))
        raise UserError(
            f"{source}: token {place} is the id {ids[place]}, but the tokenizer's ids end at "
            f"{tokenizer.vocab_size - 1}: name the tokenizer that the corpus was made with"
        )
