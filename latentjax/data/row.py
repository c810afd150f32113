"""A row of tokens that can be read from any place: what windows are cut from, wherever it is kept."""

from abc import ABC, abstractmethod

import numpy as np

from latentjax.errors import UserError


class DamagedBlock(UserError):
    """Tokens that cannot be had because what holds them is damaged, while the tokens around them can.

    Attributes:
      what: file, block and reason, in words; the message has advice behind it.
    """

    def __init__(self, what: str, advice: str):
        super().__init__(f"{what}; {advice}")
        self.what, self._advice = what, advice

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self._advice)  # to come through from a reading process


class TokenRow(ABC):
    """One long row of tokens, read by position. Reads are safe from many threads; a pickled row opens its files anew.

    Attributes:
      label: what it is and where, for messages, such as "the eval split of stores/pile".
      num_tokens: its length, end-of-document ids included.
      sequence_tokens: the length of the sequences it was packed in by whoever wrote it, if all have the same; a window
        of that length (T + 1) is exactly one such sequence. None where tokens simply follow each other.
    """

    label: str
    num_tokens: int
    sequence_tokens: int | None = None

    @abstractmethod
    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Returns tokens [start, start + length) for every start.

        Args:
          starts: (n,) int64.
          length: tokens of each window, at least 1.

        Returns:
          (n, length) int32.

        Raises:
          IndexError: a window is not within the row.
          DamagedBlock: a stretch of the row is damaged.
          UserError: a file is damaged or missing, or a token is beyond the vocabulary.
        """

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns tokens [start, start + length) as (length,) int32; raises as `read_windows`."""
        return self.read_windows(np.array([start], np.int64), length)[0]
