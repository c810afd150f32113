"""How fast data is prepared and read, each against the plainest way of doing the same, in one run.

Figures are the best of several rounds in which the two take turns: what a noisy machine adds is left out of both.
"""

import json
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from latentjax.config import default
from latentjax.data.batches import train_batches
from latentjax.data.corpus import Corpus
from latentjax.data.output import OutputDirectory
from latentjax.data.progress import Progress
from latentjax.data.readers.base import ReaderOptions
from latentjax.data.resolve import build_store, local_tasks
from latentjax.data.shards import SHARD_SUFFIX, Shard, ShardWriter
from latentjax.data.store import TokenSplit
from latentjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from latentjax.data.tokenizers.saved import read_tokenizer
from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from latentjax.data.tokenizers.training import train_sentencepiece

_EOD = "<|endoftext|>"
_VOCABULARY = 8192
_LIBRARY_BATCH_BYTES = 16 << 20  # all at once, the library's results would fill the memory
_SHARDS = 4
_SMALL_MEGABYTES = 3  # enough for several shards, and so for processes
_WINDOWS = 32768  # that a round of reading takes


@dataclass(frozen=True)
class Comparison:
    """Two rates in the same unit, and the ratio that the project promises at least."""

    name: str
    unit: str
    ours: float
    theirs: float
    promised: float

    @property
    def ratio(self) -> float:
        """Ours in terms of theirs."""
        return self.ours / self.theirs

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.ratio >= self.promised

    def line(self) -> str:
        """The comparison as a row of a table."""
        figures = f"{self.ours:>10,.1f} {self.theirs:>10,.1f} {self.unit:<10} {self.ratio:>6.2f}"
        return f"{self.name:<58} {figures}  >= {self.promised}"


@dataclass(frozen=True)
class Limit:
    """A figure and the bound that the project promises; `at_least` or at most."""

    name: str
    unit: str
    value: float
    promised: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether the promise is kept."""
        return self.value >= self.promised if self.at_least else self.value <= self.promised

    def line(self) -> str:
        """The figure as a row of a table."""
        figures = f"{self.value:>10,.1f} {'':>10} {self.unit:<10} {'':>6}"
        return f"{self.name:<58} {figures}  {'>=' if self.at_least else '<='} {self.promised}"


def as_json(result: Comparison | Limit) -> dict:
    """Returns the fields of a result, and the ratio of a comparison."""
    return asdict(result) | ({"ratio": result.ratio} if isinstance(result, Comparison) else {})


def benchmark_tokenising(
    sources: Path, directory: Path, megabytes: int, num_workers: int, tokenizer: str, rounds: int, progress: Progress
) -> Iterator[Comparison]:
    """Compares preparing a store with the tokenizer library's own batch call on the same text with as many threads.

    Ours reads JSON lines, tokenises in processes and writes a store; the library has the text in memory and keeps
    nothing. What starting the processes takes, however large the corpus, is measured on a small one and left out.

    Args:
      sources: a directory of Python files, repeated to `megabytes` of documents.
      tokenizer: a path; "" trains one of each kind on the sources.
    """
    texts = _texts(sources, megabytes)
    few = texts[: max(1, len(texts) * _SMALL_MEGABYTES // megabytes)]
    whole, small = (_write_corpus(directory / name, part) for name, part in {"whole": texts, "small": few}.items())
    given = read_tokenizer(tokenizer) if tokenizer else None
    for used in [given] if given else [_trained_huggingface(texts), train_sentencepiece(texts, _VOCABULARY)]:
        used.save(directory / used.kind)
        # Small shards, so that all workers end at about the same time.
        shard_megabytes = max(1, megabytes // (16 * num_workers))
        name = f"tokenising, {used.kind} V={used.vocab_size}, {num_workers} workers or threads"
        seconds, start_seconds, library_seconds = _take_turns(
            name,
            [
                partial(_time_preparing, whole, directory / used.kind, shard_megabytes, num_workers),
                partial(_time_preparing, small, directory / used.kind, 1, num_workers),
                partial(_in_fresh_process, num_workers, _time_library, str(directory / used.kind), whole, num_workers),
            ],
            rounds,
            progress,
        )
        size, small_size = (sum(len(text.encode()) for text in part) / 1e6 for part in (texts, few))
        ours = (size - small_size) / (seconds - start_seconds)
        yield Comparison(name, "MB/s", ours, size / library_seconds, 0.9)


def _write_corpus(path: Path, texts: Sequence[str]) -> str:
    corpus = path.with_suffix(".jsonl")
    with corpus.open("w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return str(corpus)


def _time_preparing(path: str, tokenizer: Path, shard_megabytes: int, num_workers: int) -> float:
    data = default().data
    data.path, data.tokenizer, data.shard_megabytes = path, str(tokenizer), shard_megabytes
    corpus = Corpus(path, data.include, data.exclude, ReaderOptions(data.text_field, False))
    with tempfile.TemporaryDirectory(dir=tokenizer.parent) as place:
        began = time.perf_counter()
        build_store(data, corpus, OutputDirectory(place), local_tasks(num_workers), Progress(False))
        return time.perf_counter() - began


def _texts(sources: Path, megabytes: int) -> list[str]:
    files = [path.read_text(errors="ignore") for path in sorted(sources.rglob("*.py"))]
    texts, size = [], 0
    while size < megabytes * 10**6:
        # Told apart, or every copy would be on the same side of the held-out split.
        text = f"# {len(texts)}\n{files[len(texts) % len(files)]}"
        texts.append(text)
        size += len(text)
    return texts


def _trained_huggingface(texts: Sequence[str]) -> HuggingFaceTokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=_VOCABULARY, special_tokens=[_EOD], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts[:500], trainer)
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), _EOD)


def _time_library(tokenizer_directory: str, corpus: str, threads: int) -> float:
    tokenizer = read_tokenizer(tokenizer_directory, _EOD if "huggingface" in tokenizer_directory else "")
    with open(corpus) as file:
        texts = [json.loads(line)["text"] for line in file]
    batches, size = [[]], 0
    for text in texts:
        if size > _LIBRARY_BATCH_BYTES:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    if isinstance(tokenizer, SentencePieceTokenizer):
        import sentencepiece

        model = os.path.join(tokenizer_directory, "tokenizer.model")
        processor = sentencepiece.SentencePieceProcessor(model_file=model)

        def encode(batch: list[str]) -> None:
            processor.encode(batch, num_threads=threads)
    else:
        library = tokenizers.Tokenizer.from_file(os.path.join(tokenizer_directory, "tokenizer.json"))

        def encode(batch: list[str]) -> None:
            library.encode_batch_fast(batch, add_special_tokens=False)

    encode(batches[0][:10])
    began = time.perf_counter()
    for batch in batches:
        encode(batch)
    return time.perf_counter() - began


def write_store(sources: Path, directory: Path, megabytes: int) -> tuple[TokenSplit, Path]:
    """Writes a split of so many megabytes of uint16 tokens of real text, repeated, and the same as one plain file."""
    texts = _texts(sources, 20)
    tokenizer = train_sentencepiece(texts, _VOCABULARY)
    tokens = np.concatenate([np.append(ids, tokenizer.eod_id) for ids in tokenizer.encode_batch(texts)])
    per_shard = megabytes * 10**6 // 2 // _SHARDS
    plain = directory / "tokens.uint16"
    shards = []
    with plain.open("wb") as file:
        for number in range(_SHARDS):
            path = directory / f"train-{number:05d}{SHARD_SUFFIX}"
            writer = ShardWriter(path, "uint16")
            while writer.tokens < per_shard:
                part = np.roll(tokens, 7919 * writer.tokens)[: per_shard - writer.tokens]
                writer.add(part)
                part.astype("<u2").tofile(file)
            writer.close()
            shards.append(asdict(Shard(path.name, per_shard, path.stat().st_size, "")))
    description = {"tokens": per_shard * _SHARDS, "bytes": 0, "documents": 0, "shards": shards}
    return TokenSplit(directory, "train", description, "uint16", 8192), plain


def benchmark_reading(
    split: TokenSplit, plain: Path, sequence_length: int, batch_size: int, rounds: int, progress: Progress
) -> Iterator[Comparison | Limit]:
    """Compares training batches from a store with cutting the same windows out of a NumPy memory map."""
    data = default().data
    data.sequence_length, data.batch_size = sequence_length, batch_size
    num_batches = max(2, _WINDOWS // batch_size)
    tokens = num_batches * batch_size * sequence_length
    starts = np.random.default_rng(0).integers(0, (split.num_tokens - 1) // sequence_length, (num_batches, batch_size))
    starts *= sequence_length
    memory_map = np.memmap(plain, np.uint16, mode="r")

    def plain_windows() -> float:
        began = time.perf_counter()
        for row in starts.tolist():
            np.stack([memory_map[start : start + sequence_length + 1] for start in row]).astype(np.int32)
        return time.perf_counter() - began

    def windows() -> float:
        began = time.perf_counter()
        for row in starts:
            split.read_windows(row, sequence_length + 1)
        return time.perf_counter() - began

    def pipeline() -> float:
        batches = train_batches(((split, 1.0),), data, eod_id=0, start_step=0)
        next(batches)
        began = time.perf_counter()
        for _ in islice(batches, num_batches):
            pass
        seconds = time.perf_counter() - began
        batches.close()
        return seconds

    name = f"windows of {sequence_length} tokens"
    window_seconds, seconds, plain_seconds = _take_turns(name, [windows, pipeline, plain_windows], rounds, progress)
    rate = tokens / 1e6
    ours, theirs = rate / window_seconds, rate / plain_seconds
    yield Comparison(f"{name}, against a NumPy memory map", "Mtoken/s", ours, theirs, 0.5)
    yield Limit(f"{name}, as training batches, per core", "Mtoken/s", rate / seconds / (os.cpu_count() or 1), 2.0, True)


def benchmark_memory(split: TokenSplit, sequence_length: int, batch_size: int) -> Limit:
    """Measures the highest resident memory of a fresh process that reads all of a split in random order."""
    value = _in_fresh_process(os.cpu_count() or 1, _peak_memory, split, sequence_length, batch_size)
    size = sum(shard.bytes for shard in split.shards) / 1e9
    return Limit(f"resident memory while reading a store of {size:.1f} GB", "MiB", value, 1024.0, False)


def _peak_memory(split: TokenSplit, sequence_length: int, batch_size: int) -> float:
    data = default().data
    data.sequence_length, data.batch_size = sequence_length, batch_size
    batches = train_batches(((split, 1.0),), data, eod_id=0, start_step=0)
    for _ in islice(batches, split.num_tokens // sequence_length // batch_size):
        pass
    batches.close()
    # Of the kernel and not of getrusage, which a new process inherits from the one that made it.
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) / 1024


def _take_turns(name: str, timed: Sequence[Callable[[], float]], rounds: int, progress: Progress) -> list[float]:
    """Returns the fewest seconds of each in `rounds` rounds of all of them."""
    seconds = []
    for number in range(rounds):
        seconds.append([each() for each in timed])
        progress.note(f"{name}: round {number + 1} of {rounds}, " + ", ".join(f"{each:.2f} s" for each in seconds[-1]))
    return [min(each) for each in zip(*seconds, strict=True)]


def _in_fresh_process(threads: int, function: Callable[..., float], *arguments) -> float:
    """Returns what a function returns in a new process, in which the tokenizer library has so many threads."""
    before = os.environ.get("RAYON_NUM_THREADS")
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)
    finally:
        if before is None:
            del os.environ["RAYON_NUM_THREADS"]
        else:
            os.environ["RAYON_NUM_THREADS"] = before
