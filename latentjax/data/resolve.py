"""From `data.path` to a token store: opened if it is one, made and kept if it is a raw corpus."""

import hashlib
import json
from pathlib import Path

from ml_collections import ConfigDict

from latentjax.data.progress import Progress
from latentjax.data.readers import Corpus
from latentjax.data.store import VERSION, TokenStore, is_store
from latentjax.data.store_writer import BLOCK_TOKENS, BLOCKS_PER_SHARD, write_store
from latentjax.data.tokenizer_training import SAMPLE_BYTES, train_sentencepiece
from latentjax.data.tokenizers import ByteTokenizer, Tokenizer, read_sentencepiece
from latentjax.errors import UserError

_MODEL_SUFFIX = ".model"


def resolve_store(data: ConfigDict, progress: bool) -> TokenStore:
    """Returns the token store of `data.path`, making it first if that is a raw corpus not seen before.

    A store made here is kept in `data.store_cache` under a name with the hash of all that determines it, so a changed
    corpus or tokenizer makes another one. Hosts or processes that do so at once do not disturb each other.

    Args:
      data: the `data` group of a config.
      progress: whether to show the making on stderr.

    Raises:
      UserError: nothing at `data.path`, a damaged store, or whatever is wrong with the corpus or its tokenizer.
    """
    vocabulary = f" --vocab_size {data.tokenizer_vocab_size}" if data.tokenizer == "sentencepiece" else ""
    advice = f"python -m latentjax.prepare --input CORPUS --tokenizer {data.tokenizer}{vocabulary} --output"
    if not data.path:
        raise UserError(
            "data.path is empty: set it to a raw corpus (a file or directory) or to a token store made with "
            f"`{advice} DIRECTORY`"
        )
    path = Path(data.path).expanduser()
    if not path.exists():
        raise UserError(f"data.path: there is nothing at {data.path}; `{advice} {data.path}` makes a token store there")
    if path.is_dir() and is_store(path):
        return TokenStore(path)
    corpus = open_corpus(data)
    recipe = recipe_of(data, corpus)
    place = Path(data.store_cache).expanduser() / f"{corpus.path.stem or 'corpus'}-{recipe[:16]}"
    if place.exists():
        return TokenStore(place)
    return build_store(data, corpus, place, num_workers=1, progress=Progress(progress))


def open_corpus(data: ConfigDict) -> Corpus:
    """Returns the raw corpus at `data.path`.

    Raises:
      UserError: there is none, or none of its files is wanted.
    """
    return Corpus(data.path, data.include, data.exclude, data.text_field)


def recipe_of(data: ConfigDict, corpus: Corpus) -> str:
    """Returns the SHA-256 in hex of all that determines the store of a corpus.

    Files are told by name, size and time of change, not read. The patterns that chose them do not count: the same
    files make the same store.
    """
    tokenizer: dict[str, str | int] = {"kind": data.tokenizer}
    if data.tokenizer == "sentencepiece":
        tokenizer |= {"vocab_size": data.tokenizer_vocab_size, "sample_bytes": SAMPLE_BYTES}
    elif data.tokenizer != ByteTokenizer.kind:
        tokenizer = {"kind": _MODEL_SUFFIX, "fingerprint": make_tokenizer(data, corpus, Progress(False)).fingerprint}
    recipe = {
        "version": VERSION,
        "layout": [BLOCK_TOKENS, BLOCKS_PER_SHARD],
        "path": str(corpus.path),
        "files": [[file.name, file.size, file.changed] for file in corpus.files],
        "text_field": data.text_field,
        "tokenizer": tokenizer,
        "eval_fraction": data.eval_fraction,
    }
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def build_store(data: ConfigDict, corpus: Corpus, output: Path, *, num_workers: int, progress: Progress) -> TokenStore:
    """Makes the tokenizer and then the store of `corpus` at `output`, as `data` says; see `write_store`.

    Raises:
      UserError: as `make_tokenizer` and `write_store`.
    """
    return write_store(
        output,
        corpus,
        make_tokenizer(data, corpus, progress),
        eval_fraction=data.eval_fraction,
        recipe=recipe_of(data, corpus),
        num_workers=num_workers,
        progress=progress,
    )


def make_tokenizer(data: ConfigDict, corpus: Corpus, progress: Progress) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names, training it on `corpus` where it says `sentencepiece`.

    Raises:
      UserError: no such tokenizer or file, or a vocabulary that does not suit the corpus.
    """
    if data.tokenizer == ByteTokenizer.kind:
        return ByteTokenizer()
    if data.tokenizer.endswith(_MODEL_SUFFIX):
        return read_sentencepiece(data.tokenizer)
    if data.tokenizer != "sentencepiece":
        raise UserError(
            f"unknown tokenizer {data.tokenizer!r}: it is bytes, sentencepiece or the path of a sentencepiece "
            f"{_MODEL_SUFFIX} file"
        )
    with progress.stage("reading for the tokenizer", corpus.total_bytes) as stage:

        def texts():
            for document in corpus.documents():
                stage.advance(document.file_bytes, 0)
                yield document.text

        return train_sentencepiece(texts(), data.tokenizer_vocab_size)
