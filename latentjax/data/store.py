"""The token store: a directory of tokenised documents that can be read from any token on.

    manifest.json                 what the store holds and was made from; written last
    tokenizer.json, .model        the tokenizer
    train-00000.arrayrecord ...   the tokens of a split, cut into blocks; one record is one block
    eval-00000.arrayrecord  ...

A split is one long row of tokens, each document followed by an end-of-document id. Every block but a split's last
has `block_tokens` tokens (little-endian, of the manifest's dtype), so a token's record is found by division.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import grain
import numpy as np

from latentjax.data.tokenizers import Tokenizer, load_tokenizer
from latentjax.errors import UserError

FORMAT = "latentjax token store"
VERSION = 1
MANIFEST_FILE = "manifest.json"
SHARD_SUFFIX = ".arrayrecord"
SPLITS = ("train", "eval")
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Shard:
    """One file of a split: its name, number of records (blocks), size in bytes and SHA-256 in hex."""

    name: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _WholeShard:
    """What ArrayRecord takes for a shard whose number of records is known, so that it need not open it to count."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class TokenSplit:
    """The tokens of one split. Reads are safe from many threads; a pickled split opens its files anew."""

    def __init__(self, directory: Path, name: str, description: dict, dtype: str, block_tokens: int):
        """Makes a split of a manifest's `description` of it; opens no file. `TokenStore.split` is the way here."""
        self.name = name
        self.num_tokens = int(description["tokens"])  # end-of-document ids included
        self.num_bytes = int(description["bytes"])  # of UTF-8 text
        self.num_documents = int(description["documents"])
        self.shards = tuple(Shard(**shard) for shard in description["shards"])
        self.directory = directory
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._block_tokens = int(block_tokens)
        if sum(shard.records for shard in self.shards) != -(-self.num_tokens // self._block_tokens):
            raise ValueError(f"the shards of {name} do not add up to its {self.num_tokens} tokens")
        self._source = grain.sources.ArrayRecordDataSource(
            [_WholeShard(str(directory / shard.name), 0, shard.records, shard.records) for shard in self.shards]
        )

    def read(self, start: int, length: int) -> np.ndarray:
        """Returns tokens [start, start + length) as int32, reading only the blocks that hold them.

        Raises:
          IndexError: the range is not within the split.
          UserError: a shard is damaged.
        """
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise IndexError(f"tokens {start}..{start + length} of {self.name}, which has {self.num_tokens}")
        tokens = np.empty(length, np.int32)
        filled = 0
        while filled < length:
            block, skip = divmod(start + filled, self._block_tokens)
            part = self._read_block(block)[skip : skip + length - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
        return tokens

    def _read_block(self, block: int) -> np.ndarray:
        expected = min(self._block_tokens, self.num_tokens - block * self._block_tokens) * self._dtype.itemsize
        try:
            record = self._source[block]
            reason = f"it has {len(record)} bytes instead of {expected}"
        except (RuntimeError, ValueError, IndexError, OSError) as error:
            record, reason = b"", str(error)
        if len(record) != expected:
            shard = self.directory / self._shard_of(block).name
            raise UserError(f"the token store's shard {shard} is damaged: cannot read block {block}: {reason}")
        return np.frombuffer(record, self._dtype)

    def _shard_of(self, block: int) -> Shard:
        for shard in self.shards:
            if block < shard.records:
                return shard
            block -= shard.records
        raise IndexError(block)


class TokenStore:
    """A token store on disk."""

    def __init__(self, path: str | Path):
        """Opens a store: reads its manifest and checks that every shard is there in full length.

        Raises:
          UserError: no store there, a manifest that is damaged or of a later format, a missing or truncated shard.
        """
        self.path = Path(path).expanduser()
        self.manifest = _read_manifest(self.path / MANIFEST_FILE)
        try:
            dtype, block_tokens = self.manifest["dtype"], self.manifest["block_tokens"]
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r}")
            self._splits = {
                name: TokenSplit(self.path, name, self.manifest["splits"][name], dtype, block_tokens) for name in SPLITS
            }
            self.recipe = str(self.manifest["recipe"])  # hash of all that determined the store
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.eod_id = int(self.manifest["tokenizer"]["eod_id"])
            self._fingerprint = self.manifest["tokenizer"]["fingerprint"]
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise UserError(f"{self.path / MANIFEST_FILE} is damaged: {_reason(error)}") from error
        for split in self._splits.values():
            for shard in split.shards:
                _check_length(self.path / shard.name, shard)

    def split(self, name: str) -> TokenSplit:
        """Returns the split `train` or `eval`."""
        return self._splits[name]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was made with.

        Raises:
          UserError: its files are missing, damaged or another's.
        """
        tokenizer = load_tokenizer(self.path)
        if tokenizer.fingerprint != self._fingerprint:
            raise UserError(f"the tokenizer in {self.path} is not the one that its {MANIFEST_FILE} names")
        return tokenizer

    def verify(self) -> None:
        """Reads every shard and compares it with its SHA-256.

        Raises:
          UserError: a shard is not as it was written.
        """
        for split in self._splits.values():
            for shard in split.shards:
                if hash_file(self.path / shard.name) != shard.sha256:
                    raise UserError(f"the token store's shard {self.path / shard.name} is damaged: its hash differs")


def is_store(path: Path) -> bool:
    """Whether `path` is a directory that is, or was meant to be, a token store (and not a raw corpus)."""
    return (path / MANIFEST_FILE).is_file() or any(path.glob(f"train-*{SHARD_SUFFIX}"))


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path.parent} is no token store: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not isinstance(manifest["version"], int):
        raise UserError(f"{path} is not the manifest of a {FORMAT}")
    if manifest["version"] > VERSION:
        raise UserError(
            f"{path} has format version {manifest['version']}, but this latentjax reads up to {VERSION}: "
            "upgrade latentjax or prepare the store again"
        )
    return manifest


def _check_length(path: Path, shard: Shard) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"the token store's shard {path} is missing: {error.strerror}") from error
    if size != shard.bytes:
        raise UserError(f"the token store's shard {path} is damaged: {size} bytes instead of {shard.bytes}")


def _reason(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)
