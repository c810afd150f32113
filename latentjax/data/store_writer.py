"""Writing a token store: documents are held out, cut into blocks and put in place in one move."""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

import latentjax
from latentjax.data.progress import Progress, Stage
from latentjax.data.readers import Corpus
from latentjax.data.store import FORMAT, MANIFEST_FILE, SHARD_SUFFIX, SPLITS, VERSION, Shard, TokenStore, hash_file
from latentjax.data.tokenization import EncodedDocument, encode_documents
from latentjax.data.tokenizers import Tokenizer
from latentjax.errors import UserError

# 16 KiB of uint16: a few windows of 2048 tokens. Shorter blocks cost index memory (8 bytes each), longer ones read more
# than a window needs.
BLOCK_TOKENS = 8192
# 256 MiB of uint16 a shard.
BLOCKS_PER_SHARD = 16384
# One block per group makes it readable alone; uncompressed, a read takes 8 us instead of 30.
_WRITER_OPTIONS = "group_size:1,uncompressed"


def write_store(
    output: str | Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    eval_fraction: float,
    recipe: str,
    num_workers: int,
    progress: Progress,
) -> TokenStore:
    """Tokenises `corpus` into a new store at `output`, which appears there whole or not at all.

    The files are the same bytes for any number of workers.

    Args:
      output: a path where there is nothing yet (or an empty directory). If another process puts a store of the same
        recipe there meanwhile, that one is kept.
      eval_fraction: share of documents held out, in (0, 1); by a hash of the text, so that copies of a document are
        on the same side. Of two documents or more at least one is on each side; a lone document is cut in two.
      recipe: hash of all that determines the result, kept in the manifest.
      num_workers: processes that tokenise.

    Raises:
      UserError: a fraction out of range, something else at `output`, a disk that cannot be written, and whatever is
        wrong with the corpus.
    """
    if not 0 < eval_fraction < 1:
        raise UserError(f"data.eval_fraction must be between 0 and 1, not {eval_fraction}")
    if num_workers < 1:
        raise UserError(f"the number of workers must be at least 1, not {num_workers}")
    output = Path(output).expanduser().absolute()
    partial = output.with_name(f".{output.name}.partial-{socket.gethostname()}-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output)
        partial.mkdir()
        try:
            _write(partial, corpus, tokenizer, eval_fraction, recipe, num_workers, progress)
            _move_into_place(partial, output, recipe)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write the token store {output}: {error.strerror or error}") from error
    return TokenStore(output)


def _write(
    directory: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    eval_fraction: float,
    recipe: str,
    num_workers: int,
    progress: Progress,
) -> None:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    writers = {name: _SplitWriter(directory, name, dtype, tokenizer.eod_id) for name in SPLITS}
    with progress.stage("tokenising", corpus.total_bytes) as stage:
        encoded = _reported(encode_documents(corpus.documents(), tokenizer, num_workers), stage)
        for name, ids, text_bytes in assign_splits(encoded, eval_fraction, tokenizer.bytes_per_id):
            writers[name].add(ids, text_bytes)
        splits = {name: writer.finish() for name, writer in writers.items()}
    if corpus.skipped:
        progress.note(f"left out {len(corpus.skipped)} of {len(corpus.files)} files, which are not UTF-8 text")
    tokenizer.save(directory)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "recipe": recipe,
        "corpus": {
            "path": str(corpus.path),
            "files": len(corpus.files),
            "file_bytes": corpus.total_bytes,
            "documents": stage.documents,
            "bytes": sum(split["bytes"] for split in splits.values()),
            "skipped_not_utf8": corpus.skipped,
        },
        "eval_fraction": eval_fraction,
        "tokenizer": {
            "kind": tokenizer.kind,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
        },
        "dtype": dtype,
        "block_tokens": BLOCK_TOKENS,
        "splits": splits,
        "versions": {
            "latentjax": latentjax.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("array_record", "numpy", "sentencepiece")},
        },
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def _reported(encoded: Iterable[EncodedDocument], stage: Stage) -> Iterator[EncodedDocument]:
    for document in encoded:
        yield document
        stage.advance(document.file_bytes, len(document.ids) + 1)


def assign_splits(
    encoded: Iterable[EncodedDocument], eval_fraction: float, bytes_per_id: np.ndarray
) -> Iterator[tuple[str, np.ndarray, int]]:
    """Yields (split, ids, bytes of text) for every document.

    A document is held out where the hash of its text is below `eval_fraction` of the range. As long as all of them fall
    on one side, the one nearest to the border is held back, to go to the other side if none comes that belongs there;
    from then on they come in order.

    Args:
      bytes_per_id: (V,) int32, to share out the bytes of a lone document that is cut in two.

    Raises:
      UserError: a lone document of fewer than two tokens.
    """
    border = int(eval_fraction * 2**64)
    held: EncodedDocument | None = None
    count = 0
    both_sides = False

    def side(document: EncodedDocument) -> str:
        return "eval" if document.text_hash < border else "train"

    for document in encoded:
        count += 1
        if held is None and not both_sides:
            held = document
            continue
        if held is not None and side(document) != side(held):
            both_sides = True
            yield side(held), held.ids, held.text_bytes
            held = None
        elif held is not None and abs(document.text_hash - border) < abs(held.text_hash - border):
            held, document = document, held
        yield side(document), document.ids, document.text_bytes
    if held is None:
        return
    if count > 1:
        yield ("train" if side(held) == "eval" else "eval"), held.ids, held.text_bytes
        return
    if len(held.ids) < 2:
        raise UserError(f"the corpus is one document of {len(held.ids)} tokens: too little to hold any out")
    cut = len(held.ids) - min(max(1, round(eval_fraction * len(held.ids))), len(held.ids) - 1)
    tail_bytes = int(bytes_per_id[held.ids[cut:]].sum())
    yield "train", held.ids[:cut], held.text_bytes - tail_bytes
    yield "eval", held.ids[cut:], tail_bytes


class _SplitWriter:
    """Cuts documents into blocks and blocks into shards."""

    def __init__(self, directory: Path, name: str, dtype: str, eod_id: int):
        self._directory, self._name = directory, name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._eod = np.array([eod_id], self._dtype)
        self._waiting: list[np.ndarray] = []  # tokens that do not fill a block yet
        self._waiting_tokens = 0
        self._file: ArrayRecordWriter | None = None
        self._records: list[int] = []  # per shard
        self._tokens = self._bytes = self._documents = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        self._waiting += [ids.astype(self._dtype), self._eod]
        self._waiting_tokens += len(ids) + 1
        self._tokens += len(ids) + 1
        self._bytes += text_bytes
        self._documents += 1
        if self._waiting_tokens >= BLOCK_TOKENS:
            tokens = np.concatenate(self._waiting)
            whole = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
            for start in range(0, whole, BLOCK_TOKENS):
                self._write_block(tokens[start : start + BLOCK_TOKENS])
            self._waiting, self._waiting_tokens = [tokens[whole:]], len(tokens) - whole

    def _write_block(self, tokens: np.ndarray) -> None:
        if self._file is None or self._records[-1] == BLOCKS_PER_SHARD:
            self._close()
            self._records.append(0)
            self._file = ArrayRecordWriter(str(self._shard_path(len(self._records) - 1)), _WRITER_OPTIONS)
        try:
            self._file.write(tokens.tobytes())
        except RuntimeError as error:
            raise _cannot_write(error) from error
        self._records[-1] += 1

    def _shard_path(self, number: int) -> Path:
        return self._directory / f"{self._name}-{number:05d}{SHARD_SUFFIX}"

    def _close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except RuntimeError as error:
                raise _cannot_write(error) from error

    def finish(self) -> dict:
        """Writes the last, shorter block and returns the manifest's description of the split."""
        if self._waiting_tokens:
            self._write_block(np.concatenate(self._waiting))
        self._close()
        shards = []
        for number, records in enumerate(self._records):
            path = self._shard_path(number)
            shards.append(asdict(Shard(path.name, records, path.stat().st_size, hash_file(path))))
        return {
            "tokens": self._tokens,
            "bytes": self._bytes,
            "documents": self._documents,
            "shards": shards,
        }


def _cannot_write(error: RuntimeError) -> UserError:
    reason, *_ = str(error).split("; at byte")  # ArrayRecord names the file, then goes into its own insides
    return UserError(f"cannot write the token store: {reason}")


def _move_into_place(partial: Path, output: Path, recipe: str) -> None:
    try:
        os.rename(partial, output)
    except OSError:
        # Another host or process may have been first with the same store; anything else there is not ours to replace.
        if not (output / MANIFEST_FILE).is_file() or TokenStore(output).recipe != recipe:
            raise


def _remove_abandoned(output: Path) -> None:
    """Removes what killed processes of this host left of earlier attempts at the same store."""
    prefix = f".{output.name}.partial-{socket.gethostname()}-"
    for path in output.parent.iterdir():
        process = path.name.removeprefix(prefix)
        if path.name.startswith(prefix) and process.isdigit() and not _is_running(int(process)):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # ours now, and it has not begun yet
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
