"""The token store: a directory of tokenised documents that can be read from any token on.

    manifest.json                 what the store holds and was made from; written last
    tokenizer/                    the tokenizer
    train-00000.arrayrecord ...   the tokens of a split, in shards
    eval-00000.arrayrecord  ...

A split is one long row of tokens, each document followed by an end-of-document id: its shards, one behind the other. A
shard is cut into blocks of `block_tokens` tokens, the last one shorter (`latentjax.data.shards`).
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from latentjax.data.row import TokenRow
from latentjax.data.shards import SHARD_SUFFIX, Shard, ShardReader
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.data.tokenizers.saved import load_tokenizer
from latentjax.errors import UserError, brief, shown

FORMAT = "latentjax token store"
VERSION = 2
MANIFEST_FILE = "manifest.json"
PLAN_FILE = "plan.json"  # there while the store is being made
TOKENIZER_DIRECTORY = "tokenizer"
SPLITS = ("train", "eval")
DTYPES = ("uint16", "uint32")
_HASHED_AT_ONCE = 1 << 20


class TokenSplit(TokenRow):
    """The tokens of one split of a store."""

    def __init__(self, directory: Path, name: str, description: dict, dtype: str, block_tokens: int):
        """Makes a split of a manifest's `description` of it; opens no file. `TokenStore.split` is the way here."""
        self.name, self.directory = name, directory
        self.label = f"the {name} split of {directory}"
        self.num_tokens = int(description["tokens"])
        self.num_bytes = int(description["bytes"])  # of UTF-8 text
        self.num_documents = int(description["documents"])
        self.shards = tuple(Shard(**shard) for shard in description["shards"])
        self._readers = [
            ShardReader(directory / shard.name, shard.tokens, dtype, block_tokens) for shard in self.shards
        ]
        self._begins = np.cumsum([0] + [shard.tokens for shard in self.shards], dtype=np.int64)
        if self._begins[-1] != self.num_tokens or not all(shard.tokens > 0 for shard in self.shards):
            raise ValueError(f"the shards of {name} do not add up to its {self.num_tokens} tokens")

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """See `TokenRow`; reads just the blocks that hold the windows."""
        outside = (starts < 0) | (starts + length > self.num_tokens)
        if outside.any():
            start = starts[outside][0]
            raise IndexError(f"tokens {start}..{start + length} of {self.label}, which has {self.num_tokens}")
        windows = np.empty((len(starts), length), np.int32)
        numbers = np.searchsorted(self._begins, starts, side="right") - 1
        offsets = starts - self._begins[numbers]
        for window, number, offset in zip(windows, numbers.tolist(), offsets.tolist(), strict=True):
            while True:
                shard = self._readers[number]
                copied = shard.copy(offset, window)
                if copied == len(window):
                    break
                window, offset = window[copied:], offset + copied  # goes on in the next block
                if offset == shard.num_tokens:
                    number, offset = number + 1, 0
        return windows


class TokenStore:
    """A token store on disk."""

    def __init__(self, path: str | Path):
        """Opens a store: reads its manifest and checks that every shard is there in full length.

        Raises:
          UserError: no store there, one that is not finished, a manifest that is damaged or of another format, a
            missing or truncated shard.
        """
        self.path = Path(path).expanduser()
        self.manifest = _read_manifest(self.path / MANIFEST_FILE)
        try:
            dtype, block_tokens = self.manifest["dtype"], int(self.manifest["block_tokens"])
            if dtype not in DTYPES:
                raise ValueError(f"unknown dtype {dtype!r}")
            self._splits = {
                name: TokenSplit(self.path, name, self.manifest["splits"][name], dtype, block_tokens) for name in SPLITS
            }
            self.recipe = str(self.manifest["recipe"])  # hash of all that determined the store
            self.vocab_size = int(self.manifest["tokenizer"]["vocab_size"])
            self.eod_id = int(self.manifest["tokenizer"]["eod_id"])
            self.fingerprint = str(self.manifest["tokenizer"]["fingerprint"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
            raise UserError(f"{self.path / MANIFEST_FILE} is damaged: {_reason(error)}") from error
        for split in self._splits.values():
            for shard in split.shards:
                _check_length(self.path / shard.name, shard)

    def split(self, name: str) -> TokenSplit:
        """Returns the split `train` or `eval`."""
        return self._splits[name]

    @property
    def shards(self) -> list[Shard]:
        """All shards, of both splits."""
        return [shard for split in self._splits.values() for shard in split.shards]

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the store was made with.

        Raises:
          UserError: its files are missing, damaged or another's.
        """
        tokenizer = load_tokenizer(self.path / TOKENIZER_DIRECTORY)
        if tokenizer.fingerprint != self.fingerprint:
            raise UserError(f"the tokenizer in {self.path} is not the one that its {MANIFEST_FILE} names")
        return tokenizer

    def verify(self, advance: Callable[[int], None]) -> None:
        """Reads every shard and compares it with its SHA-256.

        Args:
          advance: called with the bytes read, now and then.

        Raises:
          UserError: a shard is not as it was written; all that are not are named.
        """
        damaged = [shard.name for shard in self.shards if hash_file(self.path / shard.name, advance) != shard.sha256]
        if damaged:
            raise UserError(
                f"{len(damaged)} of {len(self.shards)} shards of the token store {self.path} are damaged (their "
                f"SHA-256 differs): {', '.join(damaged)}; restore them from a copy, or remove the store and prepare it "
                "again"
            )


def is_store(path: Path) -> bool:
    """Whether `path` is a directory that is, or was meant to be, a token store (and not a raw corpus)."""
    patterns = (MANIFEST_FILE, PLAN_FILE, f"train-*{SHARD_SUFFIX}")
    return any(any(path.glob(pattern)) for pattern in patterns)


def hash_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """Returns the SHA-256 of a file in hex; `advance` is called with the bytes read, now and then.

    Raises:
      UserError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while data := file.read(_HASHED_AT_ONCE):
                digest.update(data)
                advance(len(data))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        if (path.parent / PLAN_FILE).is_file():
            raise UserError(
                f"the token store {path.parent} is not finished: give the same `python -m latentjax.prepare` command "
                "again to continue it"
            ) from error
        raise UserError(f"{path.parent} is no token store: it has no {MANIFEST_FILE}") from error
    except OSError as error:
        raise UserError(f"{path.parent} is no token store: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or type(manifest.get("version")) is not int:
        raise UserError(f"{path} is not the manifest of a {FORMAT}")
    if manifest["version"] != VERSION:
        raise UserError(
            f"{path} has format version {shown(manifest['version'])}, but this latentjax reads version {VERSION}: "
            "prepare the store again with this version, or use the version that made it"
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
    return f"it lacks {error}" if isinstance(error, KeyError) else brief(error)
