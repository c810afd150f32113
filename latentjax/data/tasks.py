"""The unit of preparation: a stretch of the corpus becomes one shard of each split and a record of what is in them.

A task depends on the job and its number alone, so any process on any machine may do it, once or again, in any order:
local workers, several hosts at once, or the workers of a Beam pipeline.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from latentjax.data.corpus import Corpus
from latentjax.data.output import OutputDirectory
from latentjax.data.readers.base import LeftOut, Malformed, Piece, Span
from latentjax.data.shards import SHARD_SUFFIX, Shard, ShardWriter
from latentjax.data.store import SPLITS, hash_file
from latentjax.data.tokenizers.base import Tokenizer, check_ids
from latentjax.errors import UserError

RECORDS_DIRECTORY = "records"
# Text is handed to the tokenizer in batches of about this: enough to be worth a call, little enough to hold.
_BATCH_CHARACTERS = 1 << 20
_NAMED_FAILURES = 20  # per task; the rest is counted


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out for evaluation: those whose hash is below `border`.

    Where the corpus is one document, `cut` is the byte (or id) of it from which on it is held out.
    """

    border: int
    cut: int | None = None

    def is_held_out(self, document_hash: int) -> bool:
        """Whether a document of that hash is on the side of evaluation."""
        return document_hash < self.border


@dataclass(frozen=True)
class Task:
    """Spans of the corpus, in order, that are worked on together; its number is also that of its shards."""

    number: int
    spans: tuple[Span, ...]

    @property
    def input_bytes(self) -> int:
        """Bytes of files, as stored."""
        return sum(span.input_bytes for span in self.spans)

    @property
    def record_name(self) -> str:
        """Name of its record in the output; it is there when the task is done."""
        return f"{RECORDS_DIRECTORY}/{self.number:05d}.json"


@dataclass(frozen=True)
class Job:
    """What all tasks of a preparation share; sent to every worker."""

    corpus: Corpus
    tokenizer: Tokenizer
    output: OutputDirectory
    held_out: HeldOut
    max_malformed: int

    @property
    def dtype(self) -> str:
        """Of the tokens in the store."""
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"


@dataclass
class SplitRecord:
    """What a task put into one split."""

    tokens: int = 0
    bytes: int = 0  # of UTF-8 text
    documents: int = 0  # that end here
    shard: dict | None = None  # as `Shard`; None where there are no tokens


@dataclass
class TaskRecord:
    """What a task did. Lengths of documents are in tokens, without the end-of-document id."""

    border: int
    cut: int | None
    splits: dict[str, SplitRecord] = field(default_factory=lambda: {name: SplitRecord() for name in SPLITS})
    beginnings: int = 0  # documents (or rows of a stream) that begin here
    units: int = 0  # bytes of text, or ids of a tokenised corpus
    lowest_hash: int | None = None
    highest_hash: int | None = None
    # Documents that begin and end here, by the number of binary digits of their length.
    lengths: dict[str, int] = field(default_factory=dict)
    head: int | None = None  # tokens of a document that began in an earlier task and ends here
    tail: int = 0  # tokens, at the end, of a document that goes on in the next task
    malformed: int = 0
    first_malformed: list[str] = field(default_factory=list)
    left_out: int = 0
    first_left_out: list[str] = field(default_factory=list)

    @classmethod
    def from_json(cls, value: dict) -> "TaskRecord":
        """Reads what `asdict` made."""
        splits = {name: SplitRecord(**value["splits"][name]) for name in SPLITS}
        return cls(**{**value, "splits": splits})

    def holds_under(self, rule: HeldOut) -> bool:
        """Whether the task would do the same under another rule."""
        if self.beginnings == self.units == 0:
            return True
        if self.cut != rule.cut or self.lowest_hash is None or self.highest_hash is None:
            return (self.border, self.cut) == (rule.border, rule.cut)
        low, high = sorted((self.border, rule.border))
        return low == high or self.lowest_hash >= high or self.highest_hash < low


Report = Callable[[int, int, int], None]  # bytes of files, documents and tokens since the last call


def run_task(job: Job, task: Task, report: Report) -> None:
    """Does a task and leaves its shards and then its record in the output.

    Holds about a batch of text and its tokens at a time, whatever the size of the task or of a document.

    Raises:
      UserError: the corpus cannot be read or is damaged, more malformed documents than `job.max_malformed`, a token id
        beyond the vocabulary, or an output that cannot be written.
    """
    record = TaskRecord(job.held_out.border, job.held_out.cut)
    lengths = _Lengths(record)
    with ExitStack() as staging:
        outputs = {name: _SplitOutput(job, name, task.number, record.splits[name], staging) for name in SPLITS}
        for pieces in _batches(_pieces(job, task, record)):
            tokens = 0
            for piece, name, ids, size in _encoded(job, pieces):
                outputs[name].add(piece, ids, size)
                lengths.add(piece, len(ids))
                tokens += len(ids) + piece.is_last
            report(sum(piece.input_bytes for piece in pieces), sum(piece.is_last for piece in pieces), tokens)
        lengths.finish()
        for output in outputs.values():
            output.finish()
    job.output.write_json(task.record_name, asdict(record))


def _pieces(job: Job, task: Task, record: TaskRecord) -> Iterator[Piece]:
    """Yields what can be read; notes in the record what cannot, and what was met."""
    for span in task.spans:
        for item in job.corpus.read(span):
            if isinstance(item, LeftOut):
                record.left_out += 1
                record.first_left_out = [*record.first_left_out, f"{item.name}: {item.reason}"][:_NAMED_FAILURES]
            elif isinstance(item, Malformed):
                record.malformed += 1
                place = f"{item.source}: {item.reason}"
                record.first_malformed = [*record.first_malformed, place][:_NAMED_FAILURES]
                if record.malformed > job.max_malformed:
                    raise too_many_malformed(record.malformed, job.max_malformed, record.first_malformed[0])
            else:
                record.beginnings += item.offset == 0
                record.units += len(item.content.encode() if isinstance(item.content, str) else item.content)
                low, high = record.lowest_hash, record.highest_hash
                record.lowest_hash = item.document_hash if low is None else min(low, item.document_hash)
                record.highest_hash = item.document_hash if high is None else max(high, item.document_hash)
                yield from _cut(item, job.held_out.cut)


def too_many_malformed(count: int, limit: int, first: str) -> UserError:
    """The error of a corpus with more malformed documents than are passed over."""
    return UserError(
        f"{count} malformed documents, more than data.max_malformed={limit}; the first is {first}; mend them, or raise "
        "the limit (--max_malformed) to leave them out"
    )


def _cut(piece: Piece, cut: int | None) -> Iterator[Piece]:
    """Divides a piece in which the held-out part of a lone document begins; the part before it ends a document too."""
    if cut is None or piece.offset >= cut:
        yield piece
        return
    data = piece.content.encode() if isinstance(piece.content, str) else piece.content
    size = cut - piece.offset
    if size > len(data):
        yield piece
    elif size == len(data):
        yield replace(piece, is_last=True)
    else:
        # A character that the cut would tear is held out.
        before = data[:size].decode(errors="ignore") if isinstance(data, bytes) else data[:size]
        yield replace(piece, content=before, is_last=True, input_bytes=0)
        yield replace(piece, content=piece.content[len(before) :], offset=cut)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.content) + 64  # so that empty documents do not pile up without end
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(job: Job, pieces: list[Piece]) -> Iterator[tuple[Piece, str, np.ndarray, int]]:
    """Yields each piece with its split, ids and bytes of text."""
    texts = [piece.content for piece in pieces if isinstance(piece.content, str)]
    continued = [piece.offset > 0 for piece in pieces if isinstance(piece.content, str)]
    encoded = iter(job.tokenizer.encode_batch(texts, continued))
    eod_id = job.tokenizer.eod_id
    for piece in pieces:
        if isinstance(piece.content, str):
            ids, size = next(encoded), len(piece.content.encode())
        else:
            check_ids(piece.content, job.tokenizer, piece.source)
            ids = piece.content
            size = int(job.tokenizer.bytes_per_id[ids].sum())
            if piece.is_last and len(ids) and ids[-1] == eod_id:
                ids = ids[:-1]  # it is put there again
        if job.held_out.cut is not None:
            held_out = piece.offset >= job.held_out.cut
        else:
            held_out = job.held_out.is_held_out(piece.document_hash)
        yield piece, "eval" if held_out else "train", ids, size


class _SplitOutput:
    """The shard that a task writes for one split, made when there is something to put into it."""

    def __init__(self, job: Job, split: str, number: int, record: SplitRecord, staging: ExitStack):
        self._job, self._name, self._record = job, f"{split}-{number:05d}{SHARD_SUFFIX}", record
        self._staging = staging  # puts the shard in place when the task has succeeded
        self._end = np.array([job.tokenizer.eod_id], np.int32)
        self._writer: ShardWriter | None = None

    def add(self, piece: Piece, ids: np.ndarray, size: int) -> None:
        self._record.bytes += size
        if piece.is_last:
            self._record.documents += 1
            ids = np.concatenate([ids, self._end])
        if len(ids) == 0:
            return
        if self._writer is None:
            self._path = self._staging.enter_context(self._job.output.staged(self._name))
            self._writer = ShardWriter(self._path, self._job.dtype)
            self._staging.callback(self._writer.abandon)
        self._writer.add(ids)

    def finish(self) -> None:
        """Closes the shard and notes what it holds."""
        if self._writer is None:
            self._job.output.remove(self._name)  # of this task under another rule
            return
        self._writer.close()
        self._record.tokens = self._writer.tokens
        shard = Shard(self._name, self._writer.tokens, self._path.stat().st_size, hash_file(self._path))
        self._record.shard = asdict(shard)


class _Lengths:
    """Counts documents by their length, those that lie over several tasks by their parts."""

    def __init__(self, record: TaskRecord):
        self._record = record
        self._open: int | None = None  # tokens so far of the document being read
        self._began_earlier = False

    def add(self, piece: Piece, tokens: int) -> None:
        if self._open is None:
            self._open, self._began_earlier = 0, piece.offset > 0
        self._open += tokens
        if piece.is_last:
            if self._began_earlier:
                self._record.head = self._open
            else:
                digits = str(self._open.bit_length())
                self._record.lengths[digits] = self._record.lengths.get(digits, 0) + 1
            self._open = None

    def finish(self) -> None:
        if self._open is not None:
            self._record.tail = self._open
