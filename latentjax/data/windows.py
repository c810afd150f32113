"""Windows of rows of tokens, and batches of them: each batch a pure function of the step.

Window i of T+1 tokens begins at token i * T: neighbours share a token, so that all but a row's first are predicted once
per epoch. Where a row was packed into sequences of just T+1 tokens, as Pythia's published data is, window i is sequence
i. Global batch i is places [i B, (i+1) B) of the stream that `data.order` describes.

No jax and no Grain here: processes that read batches import this module and little else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from latentjax.data.order import Order
from latentjax.data.row import DamagedBlock, TokenRow
from latentjax.data.skips import Skip, batch_of_step
from latentjax.errors import UserError

Batch = dict[str, Any]  # arrays; where blocks are damaged also the list DAMAGED, of texts

# Key of a batch under which the reasons stand why windows were left out: a list of texts, and no array.
DAMAGED = "damaged"

_LOCATED_AT_ONCE = 4096  # places of the stream: enough that the arithmetic is lost in the reading


class Windows:
    """The windows of a row: so many of T+1 tokens each."""

    def __init__(self, row: TokenRow, sequence_length: int):
        """Lists the windows of T+1 tokens.

        Raises:
          UserError: the row has fewer tokens than one window.
        """
        self.row, self.length = row, sequence_length + 1
        packed = row.sequence_tokens == self.length
        self._stride = self.length if packed else sequence_length
        self._count = (row.num_tokens - self.length) // self._stride + 1 if row.num_tokens >= self.length else 0
        if not self._count:
            raise UserError(
                f"{row.label} has {row.num_tokens} tokens, fewer than one window of data.sequence_length + 1 = "
                f"{self.length}: shorten data.sequence_length or use a larger corpus (of a raw corpus, raising "
                "data.eval_fraction holds more out)"
            )

    def __len__(self) -> int:
        return self._count

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the windows of these numbers, (n,) int64, as (n, T+1) int32; raises as `TokenRow.read_windows`."""
        return self.row.read_windows(np.asarray(indices, np.int64) * self._stride, self.length)

    def read_intact(self, indices: np.ndarray) -> tuple[np.ndarray, dict[int, str]]:
        """Returns the windows of these numbers, as `read`, and of those that touch a damaged block the reason, by row.

        In place of such a window are zeros, which are tokens of any vocabulary.
        """
        try:
            return self.read(indices), {}
        except DamagedBlock:
            pass  # one by one, to see which
        tokens, damaged = np.zeros((len(indices), self.length), np.int32), {}
        for row in range(len(indices)):
            try:
                tokens[row] = self.read(indices[row : row + 1])[0]
            except DamagedBlock as error:
                damaged[row] = error.what
        return tokens, damaged


class TrainBatches:
    """Some rows of the training batches from `start_step` on, as a random-access source that can be pickled."""

    def __init__(
        self,
        mixture: Sequence[tuple[TokenRow, float]],
        data: ConfigDict,
        eod_id: int,
        start_step: int,
        rows: np.ndarray,
        skips: Sequence[Skip] = (),
    ):
        self._components = [Windows(row, data.sequence_length) for row, _ in mixture]
        weights = [weight for _, weight in mixture]
        self._order = Order([len(each) for each in self._components], weights, seed=data.seed, shuffle=data.shuffle)
        self._start_step, self._skips = start_step, tuple(skips)
        self._batch_size: int = data.batch_size
        self._located: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._rows = rows
        self._shape = (len(self._rows), data.sequence_length + 1)
        self._eod_id, self._mask_documents = eod_id, data.mask_documents
        self._leaves_out = data.on_corrupt_block == "skip"

    def __len__(self) -> int:
        # No end, but places are 64-bit numbers.
        return 2**62 // self._batch_size - max([self._start_step, *(skip.batch for skip in self._skips)])

    def __getitem__(self, index: int) -> Batch:
        components, windows = self._locate(batch_of_step(self._start_step + int(index), self._skips))
        if self._leaves_out:
            return self._intact_batch(components, windows)
        if len(self._components) == 1:
            tokens = self._components[0].read(windows)
        else:
            tokens = np.empty(self._shape, np.int32)
            for component in np.unique(components):
                rows = components == component
                tokens[rows] = self._components[component].read(windows[rows])
        return _make_batch(tokens, self._eod_id, self._mask_documents)

    def _intact_batch(self, components: np.ndarray, windows: np.ndarray) -> Batch:
        """As `__getitem__`, without the windows that touch a damaged block."""
        tokens, damaged = np.empty(self._shape, np.int32), {}
        for component in np.unique(components):
            rows = np.flatnonzero(components == component)
            tokens[rows], reasons = self._components[component].read_intact(windows[rows])
            damaged |= {int(rows[row]): reason for row, reason in reasons.items()}
        return _leave_out(_make_batch(tokens, self._eod_id, self._mask_documents), damaged)

    def _locate(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the component and the window of each row, worked out for many batches at once at the same cost."""
        batches_at_once = max(1, _LOCATED_AT_ONCE // len(self._rows))
        chunk, place = divmod(number, batches_at_once)
        located = self._located.get(chunk)
        if located is None:
            numbers = chunk * batches_at_once + np.arange(batches_at_once, dtype=np.int64)
            located = self._order.locate((numbers[:, np.newaxis] * self._batch_size + self._rows).ravel())
            # Threads are at most a few steps apart: this chunk and the one before are all they want.
            self._located = {chunk: located} | {key: each for key, each in self._located.items() if key == chunk - 1}
        rows = slice(place * len(self._rows), (place + 1) * len(self._rows))
        return located[0][rows], located[1][rows]


class EvalBatches:
    """Some rows of the batches of an evaluation, as a random-access source."""

    def __init__(
        self, row: TokenRow, data: ConfigDict, num_windows: int, eod_id: int, bytes_per_id: np.ndarray, rows: np.ndarray
    ):
        self._windows = Windows(row, data.sequence_length)
        self._count = min(num_windows, len(self._windows))
        self._batch_size, self._rows = data.batch_size, rows
        self._eod_id, self._mask_documents = eod_id, data.mask_documents
        self._leaves_out = data.on_corrupt_block == "skip"
        self._bytes_per_id = bytes_per_id.astype(np.int32, copy=False)

    def __len__(self) -> int:
        return -(-self._count // self._batch_size)

    def __getitem__(self, index: int) -> Batch:
        places = int(index) * self._batch_size + self._rows
        # A row of padding holds tokens too (any will do), so that no step meets ids it cannot embed.
        windows = np.minimum(places, self._count - 1) * len(self._windows) // self._count
        tokens, damaged = self._windows.read_intact(windows) if self._leaves_out else (self._windows.read(windows), {})
        batch = _leave_out(_make_batch(tokens, self._eod_id, self._mask_documents), damaged)
        batch["loss_weights"] *= (places < self._count)[:, np.newaxis]
        batch["target_bytes"] = np.where(batch["loss_weights"] > 0, self._bytes_per_id[tokens[:, 1:]], 0)
        return batch


def _make_batch(tokens: np.ndarray, eod_id: int, mask_documents: bool) -> Batch:
    if not mask_documents:
        return {"tokens": tokens, "loss_weights": np.ones_like(tokens[:, 1:], np.float32)}
    segment_ids, positions, loss_weights = document_layout(tokens, eod_id)
    return {"tokens": tokens, "loss_weights": loss_weights, "segment_ids": segment_ids, "positions": positions}


def _leave_out(batch: Batch, damaged: dict[int, str]) -> Batch:
    """Takes all weight from damaged rows.

    The batch stays a function of its number, whoever reads which rows of it: to put other windows in their place would
    train on those twice, and they may be damaged too. Where there is damage the batch says so in `damaged`.
    """
    if damaged:
        batch["loss_weights"][list(damaged)] = 0
        batch[DAMAGED] = list(damaged.values())
    return batch


def document_layout(tokens: np.ndarray, eod_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tells the documents of each window apart.

    A document ends with its end-of-document token, and the next one begins behind it. The part of a document that a
    window begins in the middle of counts as a document of its own.

    Args:
      tokens: (B, T+1) int32, inputs and, one to the right, their targets.
      eod_id: the end-of-document id.

    Returns:
      segment_ids (B, T) int32: number of the input token's document within the window, from 1.
      positions (B, T) int32: number of the input token within its document (in the window), from 0.
      loss_weights (B, T) float32: 0 where the input ends a document, since the target is another's; else 1.
    """
    inputs = tokens[:, :-1]
    rows, length = inputs.shape
    begins = np.empty((rows, length), bool)
    begins[:, 0] = True
    np.equal(inputs[:, :-1], eod_id, out=begins[:, 1:])
    # All rows as one, document by document: some three times faster than sums along each row.
    firsts = np.flatnonzero(begins)
    counts = np.diff(firsts, append=rows * length)
    before = np.searchsorted(firsts, np.arange(rows) * length)  # documents before each row
    numbers = np.arange(1, len(firsts) + 1) - before[firsts // length]
    segment_ids = np.repeat(numbers.astype(np.int32), counts)
    positions = np.arange(rows * length, dtype=np.int32) - np.repeat(firsts.astype(np.int32), counts)
    loss_weights = (inputs != eod_id).astype(np.float32)
    return segment_ids.reshape(rows, length), positions.reshape(rows, length), loss_weights
