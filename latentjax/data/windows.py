"""Batches of windows of a token store: a pure function of the step.

Window i of T+1 tokens begins at token i * T: neighbours share a token, so that all but a split's first are predicted
once per epoch. The stream of windows is one seeded permutation per epoch, one epoch after the other; global batch i is
places [i B, (i+1) B) of it.
"""

import sys
from collections.abc import Iterator

import grain
import numpy as np
from ml_collections import ConfigDict

from latentjax.data.store import TokenSplit, TokenStore
from latentjax.errors import UserError

Batch = dict[str, np.ndarray]

# Reading a window is a memory copy, or a wait for a network disk, which more threads than this seldom shorten.
_MAX_THREADS = 8


class Windows:
    """The windows of a split as a random-access source: item i is (T+1,) int32."""

    def __init__(self, split: TokenSplit, sequence_length: int):
        """Lists the windows of T+1 tokens.

        Raises:
          UserError: the split has fewer tokens than one window.
        """
        self._split, self._length = split, sequence_length
        if split.num_tokens < sequence_length + 1:
            raise UserError(
                f"the {split.name} split of {split.directory} has {split.num_tokens} tokens, fewer than one window of "
                f"data.sequence_length + 1 = {sequence_length + 1}: shorten data.sequence_length"
                + (", raise data.eval_fraction" if split.name == "eval" else "")
                + " or use a larger corpus"
            )

    def __len__(self) -> int:
        return (self._split.num_tokens - 1) // self._length

    def __getitem__(self, index: int) -> np.ndarray:
        return self._split.read(int(index) * self._length, self._length + 1)


class _HostRows(grain.MapDataset):
    """The rows of one host, in the order it reads them: item j of `rows * (number of batches)`."""

    def __init__(self, stream: grain.MapDataset, start_step: int, batch_size: int, host_index: int, num_hosts: int):
        super().__init__(stream)
        self._rows = batch_size // num_hosts
        self._start_step, self._batch_size, self._first_row = start_step, batch_size, host_index * self._rows

    def __len__(self) -> int:
        return sys.maxsize // self._batch_size * self._rows

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, self._rows)
        return self._parent[(self._start_step + step) * self._batch_size + self._first_row + row]


def train_batches(
    store: TokenStore, data: ConfigDict, *, start_step: int, host_index: int = 0, num_hosts: int = 1
) -> Iterator[Batch]:
    """Iterates over this host's rows of the global batches `start_step`, `start_step + 1`, ... without end.

    Every batch is a function of the store, `data` and its step alone; beginning at any step costs the same. With H
    hosts, host h gets rows [h B/H, (h+1) B/H) of the same global batch that a single host would get. Reading runs ahead
    in threads by `data.prefetch_batches` (0: none).

    Yields:
      tokens (B/H, T+1) int32, loss_weights (B/H, T) float32, and with `data.mask_documents` segment_ids and positions
      (B/H, T) int32; see `document_layout`.

    Raises:
      UserError: fewer tokens than one window, or B is not a multiple of the number of hosts.
    """
    _check_hosts(data, num_hosts)
    windows = Windows(store.split("train"), data.sequence_length)
    # Grain seeds epoch e with seed + e; mixed first, or epoch 1 of seed 0 would be epoch 0 of seed 1.
    seed = int(np.random.SeedSequence(data.seed).generate_state(1)[0])
    stream = grain.MapDataset.source(windows).shuffle(seed=seed).repeat()
    rows = _HostRows(stream, start_step, data.batch_size, host_index, num_hosts)
    batches = rows.batch(data.batch_size // num_hosts, drop_remainder=True).map(
        lambda tokens: _make_batch(tokens, store.eod_id, data.mask_documents)
    )
    options = grain.ReadOptions(
        num_threads=min(data.prefetch_batches, _MAX_THREADS), prefetch_buffer_size=data.prefetch_batches
    )
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    store: TokenStore, data: ConfigDict, num_batches: int, *, host_index: int = 0, num_hosts: int = 1
) -> Iterator[Batch]:
    """Iterates over this host's rows of up to `num_batches` batches of the eval split: the same for every run.

    The windows are spread evenly over the split, in its order. Where it has fewer than asked, all are used, and the
    last batch is filled up with rows of weight 0, so that all batches have one shape.

    Yields:
      what `train_batches` does, and target_bytes (B/H, T) int32: the bytes of text that each target stands for, 0
      where the loss weight is 0, so that loss / target_bytes, both summed, is in nats per byte of the same text.

    Raises:
      UserError: as `train_batches`.
    """
    _check_hosts(data, num_hosts)
    windows = Windows(store.split("eval"), data.sequence_length)
    count = min(num_batches * data.batch_size, len(windows))
    chosen = [place * len(windows) // count for place in range(count)]
    rows = data.batch_size // num_hosts
    bytes_per_id = store.tokenizer.bytes_per_id

    def batches() -> Iterator[Batch]:
        for first in range(0, count, data.batch_size):
            places = range(first + host_index * rows, first + (host_index + 1) * rows)
            # A row of padding holds tokens too (any will do), so that no step meets ids it cannot embed.
            tokens = np.stack([windows[chosen[min(place, count - 1)]] for place in places])
            batch = _make_batch(tokens, store.eod_id, data.mask_documents)
            batch["loss_weights"] *= (np.array(places) < count)[:, np.newaxis]
            batch["target_bytes"] = np.where(batch["loss_weights"] > 0, bytes_per_id[tokens[:, 1:]], 0)
            yield batch

    return batches()


def _check_hosts(data: ConfigDict, num_hosts: int) -> None:
    if data.batch_size % num_hosts:
        raise UserError(f"data.batch_size = {data.batch_size} is not a multiple of the {num_hosts} hosts that share it")


def _make_batch(tokens: np.ndarray, eod_id: int, mask_documents: bool) -> Batch:
    if not mask_documents:
        return {"tokens": tokens, "loss_weights": np.ones_like(tokens[:, 1:], np.float32)}
    segment_ids, positions, loss_weights = document_layout(tokens, eod_id)
    return {"tokens": tokens, "loss_weights": loss_weights, "segment_ids": segment_ids, "positions": positions}


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
    ends = inputs == eod_id
    begins = np.zeros_like(ends)
    begins[:, 1:] = ends[:, :-1]
    segment_ids = 1 + np.cumsum(begins, axis=1, dtype=np.int32)
    places = np.arange(inputs.shape[1], dtype=np.int32)[np.newaxis]
    positions = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return segment_ids, positions, 1 - ends.astype(np.float32)
