"""Batches read ahead of the step that needs them, in threads or in processes."""

import sys
from collections.abc import Generator, Sequence
from typing import cast

import grain
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from latentjax.data.reading_processes import read_in_processes
from latentjax.data.row import TokenRow
from latentjax.data.skips import Skip
from latentjax.data.windows import DAMAGED, Batch, EvalBatches, TrainBatches


def train_batches(
    mixture: Sequence[tuple[TokenRow, float]],
    data: ConfigDict,
    *,
    eod_id: int,
    start_step: int,
    rows: np.ndarray | None = None,
    skips: Sequence[Skip] = (),
) -> Generator[Batch, None, None]:
    """Iterates over this process's rows of the global batches of steps `start_step`, `start_step + 1`, ... without end.

    Every batch is a function of the mixture, `data`, `skips` and its step alone, whoever reads which rows of it;
    beginning at any step costs the same. Reading runs ahead by `data.prefetch_batches` (0: none), in `data.num_threads`
    threads or `data.num_workers` processes. Close the iterator after use.

    Args:
      mixture: rows of tokens, each with the share of the windows that it gives (see `data.order`).
      data: the `data` group of a config.
      eod_id: the end-of-document id of all of them.
      rows: (n,) int64, the rows of the global batch to read; None: all B.
      skips: stretches of batches that are stepped over (see `data.skips`).

    Yields:
      tokens (n, T+1) int32, loss_weights (n, T) float32, and with `data.mask_documents` segment_ids and positions
      (n, T) int32; see `document_layout`.

    Raises:
      UserError: fewer tokens than one window; when iterated, whatever `TokenRow.read_windows` raises, wherever it was
        read.
    """
    source = TrainBatches(mixture, data, eod_id, start_step, _all_rows(data) if rows is None else rows, skips)
    if data.num_workers:
        return _reported(read_in_processes(source, data.num_workers, data.prefetch_batches), data)
    return _reported(_read_in_threads(source, data), data)


def eval_batches(
    row: TokenRow,
    data: ConfigDict,
    num_batches: int,
    *,
    eod_id: int,
    bytes_per_id: np.ndarray,
    rows: np.ndarray | None = None,
    num_windows: int | None = None,
) -> Generator[Batch, None, None]:
    """Iterates over this process's rows of up to `num_batches` batches of a row: the same for every run.

    The windows are spread evenly over the row, in its order. Where it has fewer than asked, all are used, and the
    last batch is filled up with rows of weight 0, so that all batches have one shape.

    Args:
      row: held-out tokens.
      data: the `data` group of a config.
      num_batches: at least 1.
      eod_id: the end-of-document id.
      bytes_per_id: (V,) the bytes of text that each id stands for.
      rows: (n,) int64, the rows of the global batch to read; None: all B.
      num_windows: at most so many, where the batches are not to be full; None: as many as they hold.

    Yields:
      what `train_batches` does, and target_bytes (n, T) int32: the bytes of text that each target stands for, 0
      where the loss weight is 0, so that loss / target_bytes, both summed, is in nats per byte of the same text.

    Raises:
      UserError: as `train_batches`.
    """
    rows = _all_rows(data) if rows is None else rows
    held: int = num_batches * data.batch_size
    num_windows = held if num_windows is None else min(held, num_windows)
    return _reported(_read_in_threads(EvalBatches(row, data, num_windows, eod_id, bytes_per_id, rows), data), data)


def _all_rows(data: ConfigDict) -> np.ndarray:
    return np.arange(data.batch_size, dtype=np.int64)


def _reported(batches: Generator[Batch, None, None], data: ConfigDict) -> Generator[Batch, None, None]:
    """The same batches; where damage may be left out, each damaged block is named on stderr when it is first met."""
    return _name_damage(batches) if data.on_corrupt_block == "skip" else batches


def _name_damage(batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
    known = set()
    try:
        for batch in batches:
            for reason in batch.pop(DAMAGED, ()):
                if reason not in known:
                    known.add(reason)
                    tqdm.write(f"{reason}; the windows that touch it are left out", file=sys.stderr)
            yield batch
    finally:
        batches.close()


def _read_in_threads(source: TrainBatches | EvalBatches, data: ConfigDict) -> Generator[Batch, None, None]:
    num_threads = data.num_threads if data.prefetch_batches else 0
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=data.prefetch_batches)
    # A generator to all who use it: iterated over and closed.
    return cast(Generator[Batch, None, None], iter(grain.MapDataset.source(source).to_iter_dataset(options)))
