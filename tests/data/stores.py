"""Small corpora and the stores made of them, for tests."""

import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from latentjax.config import default
from latentjax.data.output import OutputDirectory
from latentjax.data.progress import Progress
from latentjax.data.resolve import build_store, local_tasks, open_corpus
from latentjax.data.store import TokenStore

TEXTS = ["", "no line end", "zwölf 日本 \u2581 🙂\n", "  \t spaces \n\n", "", "twice", "twice"] + [
    f"document {n}\n" + "text " * n for n in range(60)
]


def write_json_lines(path: Path, texts: list[str]) -> Path:
    """Writes a JSON-lines corpus."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def data_config(path: Path, cache: Path) -> ConfigDict:
    """The data group for a corpus in bytes with a tenth held out."""
    data = default().data
    data.path, data.tokenizer, data.store_cache, data.eval_fraction = str(path), "bytes", str(cache), 0.1
    return data


def build(data: ConfigDict, output: Path, num_workers: int = 1, stream=None) -> TokenStore:
    """Prepares the corpus of `data.path`."""
    corpus = open_corpus(data.path, data)
    progress = Progress(stream is not None, stream)
    build_store(data, corpus, OutputDirectory(str(output)), local_tasks(num_workers), progress)
    return TokenStore(output)


def documents_of(store: TokenStore, name: str) -> list[str]:
    """The texts of a split, in order; its counts must be right."""
    split = store.split(name)
    tokens = split.read(0, split.num_tokens)
    assert tokens.dtype == np.int32
    ends = np.flatnonzero(tokens == store.eod_id)
    assert len(ends) == split.num_documents and ends[-1] == len(tokens) - 1
    pieces = np.split(tokens, ends + 1)[:-1]
    texts = [store.tokenizer.decode_bytes(piece[:-1]).decode() for piece in pieces]
    assert split.num_bytes == sum(len(text.encode()) for text in texts)
    return texts


def content_of(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by name."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
