"""A row of tokens held in memory, for tests of what is done with rows."""

import numpy as np

from latentjax.data.row import TokenRow
from latentjax.errors import UserError


class ArrayRow(TokenRow):
    """The tokens of an array; token `bad` stands for a damaged place."""

    def __init__(self, tokens, label="the train split of memory", sequence_tokens=None, bad=-1):
        self.tokens = np.asarray(tokens, np.int32)
        self.label, self.num_tokens, self.sequence_tokens = label, len(self.tokens), sequence_tokens
        self.bad = bad

    def read_windows(self, starts, length):
        """As the interface says."""
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(starts)
        tokens = self.tokens[starts[:, np.newaxis] + np.arange(length)]
        if (tokens == self.bad).any():
            raise UserError(f"{self.label} is damaged")
        return tokens
