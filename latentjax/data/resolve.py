"""From a path to a token store: opened if it is one, fetched if it is far away, made and kept if it is a raw corpus."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from latentjax.data.corpus import Corpus
from latentjax.data.output import OutputDirectory
from latentjax.data.preparation import RunTasks, claim, prepare_store
from latentjax.data.progress import Progress
from latentjax.data.readers.base import Piece, ReaderOptions, Span
from latentjax.data.remote import is_remote, open_binary
from latentjax.data.shards import BLOCK_TOKENS
from latentjax.data.store import MANIFEST_FILE, TOKENIZER_DIRECTORY, VERSION, Shard, TokenStore, hash_file, is_store
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.data.tokenizers.saved import read_tokenizer
from latentjax.data.tokenizers.training import SAMPLE_BYTES, train_sentencepiece
from latentjax.data.workers import run_in_processes
from latentjax.errors import UserError

MEGABYTE = 10**6
TRAINED = "sentencepiece"  # the tokenizer that is trained on the corpus
# Text that is read to draw the sample for training a tokenizer from, and how much of it from one place at most.
_READ_FOR_SAMPLE = 64 * SAMPLE_BYTES
_READ_FROM_SPAN = _READ_FOR_SAMPLE // 64


def resolve_store(path: str, data: ConfigDict, progress: bool) -> TokenStore:
    """Returns the token store at `path`, making it first if that is a raw corpus not seen before.

    A store made here is kept in `data.store_cache` under a name with the hash of all that determines it, so a changed
    corpus or tokenizer makes another one. Hosts or processes that do so at once do not disturb each other. A store at a
    URL is copied there too.

    Args:
      path: `data.path`, or that of a mixture or of an evaluation set.
      data: the `data` group of a config.
      progress: whether to show the making on stderr.

    Raises:
      UserError: nothing at `path`, a damaged store, or whatever is wrong with the corpus or its tokenizer.
    """
    reports = Progress(progress)
    cache = Path(data.store_cache).expanduser()
    vocabulary = f" --vocab_size {data.tokenizer_vocab_size}" if data.tokenizer == TRAINED else ""
    advice = f"python -m latentjax.prepare --input CORPUS --tokenizer {data.tokenizer}{vocabulary} --output"
    if not path:
        raise UserError(
            "data.path is empty: set it to a raw corpus (a file or directory) or to a token store made with "
            f"`{advice} DIRECTORY`"
        )
    if is_remote(path):
        if OutputDirectory(path).read_json(MANIFEST_FILE) is not None:
            return _fetched(path, cache, reports)
    elif not path.startswith("tfds:"):
        local = Path(path).expanduser()
        if local.is_dir() and is_store(local):
            return TokenStore(local)
        if not local.exists() and not set(path) & set("*?["):
            raise UserError(f"data.path: there is nothing at {path}; `{advice} {path}` makes a token store there")
    corpus = open_corpus(path, data)
    place = _place_of(corpus, data)
    build_store(data, corpus, OutputDirectory(str(place)), local_tasks(os.cpu_count() or 1), reports)
    return TokenStore(place)


def existing_store(path: str, data: ConfigDict) -> TokenStore | None:
    """Returns what `resolve_store` would, if it is on this machine already: nothing is made or fetched.

    Raises:
      UserError: as `resolve_store`.
    """
    if is_remote(path) or path.startswith("tfds:"):
        return None
    local = Path(path).expanduser()
    if not (local.is_dir() and is_store(local)):
        local = _place_of(open_corpus(path, data), data)
    return TokenStore(local) if local.is_dir() and is_store(local) else None


def _place_of(corpus: Corpus, data: ConfigDict) -> Path:
    """Where the store of a raw corpus is kept."""
    cache = Path(data.store_cache).expanduser()
    return cache / f"{Path(corpus.path).stem or 'corpus'}-{recipe_of(data, corpus)[:16]}"


def open_corpus(path: str, data: ConfigDict) -> Corpus:
    """Returns the raw corpus at `path`.

    Raises:
      UserError: there is none, or none of its files is wanted.
    """
    return Corpus(path, data.include, data.exclude, ReaderOptions(data.text_field, data.packed_rows))


def local_tasks(num_workers: int) -> RunTasks:
    """Returns what does the tasks of a preparation in processes of this machine."""
    return functools.partial(run_in_processes, num_workers=num_workers)


def recipe_of(data: ConfigDict, corpus: Corpus) -> str:
    """Returns the SHA-256 in hex of all that determines the store of a corpus.

    Files are told by name, size and stamp, not read. The patterns that chose them do not count: the same files make
    the same store.
    """
    if data.tokenizer == TRAINED:
        sample = [SAMPLE_BYTES, _READ_FOR_SAMPLE, _READ_FROM_SPAN]
        tokenizer = {"kind": TRAINED, "vocab_size": data.tokenizer_vocab_size, "sample": sample}
    else:
        tokenizer = {"fingerprint": given_tokenizer(data).fingerprint}
    recipe = {
        "version": VERSION,
        "block_tokens": BLOCK_TOKENS,
        "shard_megabytes": data.shard_megabytes,
        "path": corpus.path,
        "files": [[file.name, file.size, file.stamp] for file in corpus.files],
        "text_field": data.text_field,
        "packed_rows": data.packed_rows,
        "tokenizer": tokenizer,
        "eval_fraction": data.eval_fraction,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def build_store(
    data: ConfigDict, corpus: Corpus, output: OutputDirectory, run_tasks: RunTasks, progress: Progress
) -> None:
    """Makes the tokenizer and then the store of `corpus` at `output`, as `data` says, if it is not there yet.

    Raises:
      UserError: as `prepare_store`, and whatever is wrong with the tokenizer.
    """
    recipe = recipe_of(data, corpus)
    if claim(output, recipe):
        return
    if not 0 < data.eval_fraction < 1:
        raise UserError(f"data.eval_fraction must be between 0 and 1, not {data.eval_fraction}")
    prepare_store(
        output,
        corpus,
        lambda spans: _make_tokenizer(data, corpus, spans, progress),
        recipe=recipe,
        eval_fraction=data.eval_fraction,
        max_malformed=data.max_malformed,
        task_bytes=data.shard_megabytes * MEGABYTE,
        run_tasks=run_tasks,
        progress=progress,
    )


def given_tokenizer(data: ConfigDict) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names by its path, or `bytes`.

    Raises:
      UserError: no such tokenizer or file, or it is one that is trained on a corpus, where there is none.
    """
    if data.tokenizer == ByteTokenizer.kind:
        return ByteTokenizer()
    if data.tokenizer == TRAINED:
        raise UserError(
            f"data.tokenizer={TRAINED} is trained on raw text, and this data is tokenised already: give the path of "
            "the tokenizer that it was made with (tokenizer.json, tokenizer.model or a directory that holds one)"
        )
    return read_tokenizer(data.tokenizer, data.eod_token)


def known_tokenizer(data: ConfigDict) -> Tokenizer:
    """Returns the tokenizer of what the `data` group names, without making or fetching anything.

    Raises:
      UserError: the store or tokenizer is not there, or there is no telling before a store is made.
    """
    paths = [path for path, _ in data.mixture] or [data.path]
    local = Path(paths[0]).expanduser()
    if paths[0] and not is_remote(paths[0]) and local.is_dir() and is_store(local):
        return TokenStore(local).tokenizer
    return given_tokenizer(data)


def _make_tokenizer(data: ConfigDict, corpus: Corpus, spans: Sequence[Span], progress: Progress) -> Tokenizer:
    if data.tokenizer != TRAINED:
        return given_tokenizer(data)
    with progress.stage("reading for the tokenizer", min(corpus.total_bytes, _READ_FOR_SAMPLE)) as stage:

        def texts() -> Iterator[str]:
            for piece in _sample(corpus, spans):
                stage.advance(piece.input_bytes)
                assert isinstance(piece.content, str)  # `_sample` yields nothing else
                yield piece.content

        return train_sentencepiece(texts(), data.tokenizer_vocab_size, SAMPLE_BYTES)


def _sample(corpus: Corpus, spans: Sequence[Span]) -> Iterator[Piece]:
    """Yields a small corpus whole and in order; of a large one the beginnings of spans all over it."""
    if corpus.total_bytes <= _READ_FOR_SAMPLE:
        order, most = range(len(spans)), _READ_FOR_SAMPLE
    else:
        digests = [hashlib.blake2b(number.to_bytes(8, "little")).digest() for number in range(len(spans))]
        order, most = sorted(range(len(spans)), key=digests.__getitem__), _READ_FROM_SPAN
    total = 0
    for number in order:
        from_span = 0
        for piece in corpus.read(spans[number]):
            if not isinstance(piece, Piece):
                continue
            if not isinstance(piece.content, str):
                given_tokenizer(ConfigDict({"tokenizer": TRAINED}))  # raises: there is no text to train on
            yield piece
            from_span += len(piece.content)
            if from_span >= most:
                break
        total += from_span
        if total >= _READ_FOR_SAMPLE:
            return


def _fetched(url: str, cache: Path, progress: Progress) -> TokenStore:
    """Copies a store from a URL into the cache, checking every shard; goes on where an earlier copy stopped."""
    source = OutputDirectory(url)
    manifest = source.read_json(MANIFEST_FILE) or {}  # it may be gone by now
    try:
        shards = [Shard(**shard) for split in manifest["splits"].values() for shard in split["shards"]]
        place = cache / f"{url.rstrip('/').rsplit('/', 1)[-1]}-{manifest['recipe'][:16]}"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{url}/{MANIFEST_FILE} is damaged: it does not describe a token store") from error
    if (place / MANIFEST_FILE).is_file():
        return TokenStore(place)
    target = OutputDirectory(str(place))
    target.create()
    with progress.stage(f"copying {url}", sum(shard.bytes for shard in shards)) as stage:
        for name in OutputDirectory(f"{source.path}/{TOKENIZER_DIRECTORY}").names():
            _copy(source, target, f"{TOKENIZER_DIRECTORY}/{name}", lambda size: None)
        for shard in shards:
            path = place / shard.name
            if path.is_file() and path.stat().st_size == shard.bytes:
                stage.skip(shard.bytes)
                continue
            _copy(source, target, shard.name, stage.advance)
            if hash_file(path) != shard.sha256:
                target.remove(shard.name)
                raise UserError(f"{url}/{shard.name} is damaged: its SHA-256 is not that of the manifest")
    target.write_json(MANIFEST_FILE, manifest)
    return TokenStore(place)


def _copy(source: OutputDirectory, target: OutputDirectory, name: str, advance) -> None:
    with open_binary(f"{source.path}/{name}") as remote, target.staged(name) as path, path.open("wb") as local:
        while data := remote.read(1 << 24):
            local.write(data)
            advance(len(data))
