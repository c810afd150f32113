"""Tokenising a stream of documents, over processes where asked, always in the order of the stream."""

import hashlib
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np

from latentjax.data.readers import Document
from latentjax.data.tokenizers import Tokenizer

# A batch is one errand of a worker: large enough to be worth sending, small enough to hold a few per worker.
_BATCH_CHARACTERS = 1 << 20
_BATCHES_AHEAD = 2  # per worker: the one being worked on and the next


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """The ids of a document without an end of document (int32), a hash of its text, and what it took up."""

    ids: np.ndarray
    text_hash: int  # uniform in [0, 2**64)
    text_bytes: int  # of UTF-8
    file_bytes: int  # as in `Document`


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, num_workers: int
) -> Iterator[EncodedDocument]:
    """Encodes documents in their order; the result is the same for any number of workers.

    Holds at most about `2 * num_workers + 1` batches of a megabyte (or of one longer document) at a time.

    Args:
      documents: read in this process, as far ahead as workers can use.
      tokenizer: sent to every worker once.
      num_workers: processes; 1 encodes in this one.
    """
    if num_workers == 1:
        for batch in _batches(documents):
            yield from _encode(tokenizer, batch)
        return
    # Spawned, not forked: the parent may run threads (JAX, Grain), which do not survive a fork.
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,))
    pending: deque[Future] = deque()
    try:
        for batch in _batches(documents):
            pending.append(pool.submit(_encode_in_worker, batch))
            if len(pending) > _BATCHES_AHEAD * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(f"a tokenising process died (out of memory? {num_workers} were running)") from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer: Tokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenizer


def _encode_in_worker(batch: list[Document]) -> list[EncodedDocument]:
    return _encode(_worker_tokenizer, batch)


def _encode(tokenizer: Tokenizer, batch: list[Document]) -> list[EncodedDocument]:
    encoded = []
    for document, ids in zip(batch, tokenizer.encode_batch([document.text for document in batch]), strict=True):
        text = document.text.encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        encoded.append(EncodedDocument(ids, int.from_bytes(digest, "little"), len(text), document.file_bytes))
    return encoded


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + 64  # so that empty documents do not pile up without end
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
