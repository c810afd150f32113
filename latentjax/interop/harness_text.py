"""Text to ids and back for the evaluation harness: by a run's own tokenizer, or by transformers' for a folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from latentjax.errors import UserError, brief


class HarnessText(Protocol):
    """What the adapter needs of a tokenizer.

    Attributes:
      prefix_id: what a text is conditioned on where there is nothing before it.
      end_id: ends a text; `end_text`: how it is spelled, None if it is not.
      name: tells tokenizers apart.
    """

    prefix_id: int
    end_id: int
    end_text: str | None
    name: str

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Returns ids; with control tokens around them or without, None: as the tokenizer does by itself."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids that continue another, control tokens left out."""
        ...


class RunText:
    """By the tokenizer of a run, exactly as its training text was tokenised: no token is put before a text."""

    def __init__(self, tokenizer: Any):
        """Takes a tokenizer of the room `data`."""
        self._tokenizer = tokenizer
        # In training a document follows the end of another.
        self.prefix_id = self.end_id = int(tokenizer.eod_id)
        self.end_text = getattr(tokenizer, "eod_token", None)
        self.name = tokenizer.fingerprint

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        return list(map(int, self._tokenizer.encode(text)))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, continued=True)


class TransformersText:
    """By `transformers`' AutoTokenizer, with all that the harness's own `hf` model does around it."""

    def __init__(self, folder: str | Path):
        """Loads the tokenizer of a Hugging Face folder.

        Raises:
          UserError: transformers is not installed, or finds no tokenizer there.
        """
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(
                "the tokenizer of a Hugging Face folder is loaded by transformers, which is not installed: pip install "
                "'latentjax[tasks]'"
            ) from error
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:  # whatever the many kinds of tokenizers raise
            raise UserError(f"transformers cannot load a tokenizer from {folder}: {brief(error)}") from error
        found = [each for each in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id) if each is not None]
        if not found:
            raise UserError(f"the tokenizer in {folder} has neither a bos_token nor an eos_token to begin a text with")
        # Where there is but one of them, it does for both.
        self.prefix_id, self.end_id = found[0], found[-1]
        self.end_text = self._tokenizer.decode([self.end_id])
        self._prefix_text = self._tokenizer.decode([self.prefix_id])
        self.name = str(folder).replace("/", "__")

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        if add_special_tokens is None and text.startswith(self._prefix_text):
            add_special_tokens = False
        settings = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self._tokenizer.encode(text, **settings)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
