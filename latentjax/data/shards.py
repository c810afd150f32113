"""Shards of a token store: ArrayRecord files whose records are blocks of tokens, each with its checksum.

A record is the XXH3-64 of its tokens (8 bytes), seeded with the number of the block so that no other block passes for
it, and the tokens themselves (little-endian). ArrayRecord lays uncompressed records of one length out at even
distances, so a block can be read by one system call at a computed place; for a window's few kilobytes that is several
times faster than a call of the library, and the checksum tells if the computation, or the disk, is wrong. Then the
library reads the block: either it finds it whole, or the shard is damaged.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from xxhash import xxh3_64_digest

from latentjax.data.row import DamagedBlock
from latentjax.errors import UserError, shown

SHARD_SUFFIX = ".arrayrecord"
# 16 KiB of uint16: four windows of 2048 tokens. The longer a block, the more is read and checked besides the window.
BLOCK_TOKENS = 8192
_MOST_BLOCK_TOKENS = 1 << 20

_CHECKSUM_BYTES = 8
_REASON_LENGTH = 200  # of what the library says about a file: it goes into its own insides
# One record per chunk, so that each can be read alone.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

# The Riegeli format below ArrayRecord: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
_RIEGELI_BLOCK = 1 << 16  # every 64 KiB of the file begin with a header, also in the midst of a record
_RIEGELI_BLOCK_HEADER = 24
_RIEGELI_CONTENT = _RIEGELI_BLOCK - _RIEGELI_BLOCK_HEADER
_FIRST_RECORD = 85  # where the first record's bytes begin, not counting block headers
_RECORD_OVERHEAD = 45  # chunk header and sizes, for records of 16 KiB to 2 MiB


@dataclass(frozen=True)
class Shard:
    """One file of a split: its name, number of tokens, size in bytes and SHA-256 in hex."""

    name: str
    tokens: int
    bytes: int
    sha256: str

    def __post_init__(self):
        """Raises ValueError: one of them cannot be, or the name leads out of the store."""
        numbers = (self.tokens, self.bytes)
        if not all(type(number) is int and 0 <= number < 2**62 for number in numbers):
            raise ValueError(f"a shard of {shown(self.tokens)} tokens in {shown(self.bytes)} bytes")
        if not isinstance(self.name, str) or self.name in ("", ".", "..") or set(self.name) & {"/", "\0"}:
            raise ValueError(f"the name of a shard is {shown(self.name)}")


class ShardWriter:
    """Writes tokens into one new shard file, block by block."""

    def __init__(self, path: Path, dtype: str):
        self.tokens = self._blocks = 0
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._waiting: list[np.ndarray] = []  # tokens that do not fill a block yet
        self._waiting_tokens = 0
        try:
            self._file = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        except RuntimeError as error:
            raise cannot_write(error) from error

    def add(self, ids: np.ndarray) -> None:
        """Appends tokens; they are within the dtype."""
        self._waiting.append(ids.astype(self._dtype))
        self._waiting_tokens += len(ids)
        self.tokens += len(ids)
        if self._waiting_tokens >= BLOCK_TOKENS:
            tokens = np.concatenate(self._waiting)
            whole = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
            for start in range(0, whole, BLOCK_TOKENS):
                self._write(tokens[start : start + BLOCK_TOKENS])
            self._waiting, self._waiting_tokens = [tokens[whole:]], len(tokens) - whole

    def _write(self, tokens: np.ndarray) -> None:
        data = tokens.tobytes()
        try:
            self._file.write(xxh3_64_digest(data, self._blocks) + data)
        except RuntimeError as error:
            raise cannot_write(error) from error
        self._blocks += 1

    def close(self) -> None:
        """Writes the last, shorter block and closes the file."""
        if self._waiting_tokens:
            self._write(np.concatenate(self._waiting))
            self._waiting, self._waiting_tokens = [], 0
        self.abandon()

    def abandon(self) -> None:
        """Closes the file as it is."""
        try:
            if self._file.is_open():
                self._file.close()
        except RuntimeError as error:
            raise cannot_write(error) from error


def cannot_write(error: RuntimeError) -> UserError:
    """Makes one line of what ArrayRecord says about a file that it cannot write."""
    reason, *_ = str(error).split("; at byte")  # it names the file, then goes into its own insides
    return UserError(f"cannot write the token store: {reason}; free space or permissions, then give the command again")


class _Scratch(threading.local):
    """What a thread reads a record into, again and again."""

    def __init__(self, dtype: np.dtype, block_tokens: int):
        data = memoryview(bytearray(block_tokens * dtype.itemsize))
        # The checksum, the tokens as bytes and as tokens. One attribute: a thread's own are slow to look up.
        self.buffers = bytearray(_CHECKSUM_BYTES), data, np.frombuffer(data, dtype)


class ShardReader:
    """Tokens of one shard. Safe for many threads; a pickled one opens its file anew."""

    def __init__(self, path: Path, num_tokens: int, dtype: str, block_tokens: int):
        """Takes the shard's facts from the manifest; opens no file yet."""
        if type(block_tokens) is not int or not 0 < block_tokens <= _MOST_BLOCK_TOKENS:
            raise ValueError(f"blocks of {shown(block_tokens)} tokens")  # each thread holds one
        self.path, self.num_tokens = path, num_tokens
        self._dtype, self._block_tokens = np.dtype(dtype).newbyteorder("<"), block_tokens
        self._stride = _RECORD_OVERHEAD + _CHECKSUM_BYTES + block_tokens * self._dtype.itemsize
        self._last = (num_tokens - 1) // block_tokens
        self._last_tokens = num_tokens - self._last * block_tokens
        self._scratch = _Scratch(self._dtype, block_tokens)
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._library: ArrayRecordReader | None = None

    def __reduce__(self):
        return type(self), (self.path, self.num_tokens, self._dtype.name, self._block_tokens)

    def __del__(self, close=os.close):  # bound here: at the end of the process `os` may be gone first
        if getattr(self, "_descriptor", None) is not None:
            close(self._descriptor)

    def copy(self, offset: int, window: np.ndarray) -> int:
        """Copies tokens from `offset` on into the beginning of `window`, up to the end of their block.

        Returns:
          how many were copied.

        Raises:
          DamagedBlock: the block does not read as it was written.
          UserError: the file is missing.
        """
        block, skip = divmod(offset, self._block_tokens)
        part = self._read(block)[skip : skip + len(window)]
        count = len(part)
        window[:count] = part
        return count

    def _read(self, block: int) -> np.ndarray:
        """Returns the tokens of a block, in memory that is this thread's until its next call."""
        checksum, data, tokens = self._scratch.buffers
        if block == self._last:
            tokens = tokens[: self._last_tokens]
            data = data[: tokens.nbytes]
        place = _FIRST_RECORD + block * self._stride
        place += _RIEGELI_BLOCK_HEADER * (1 + place // _RIEGELI_CONTENT)
        size = len(data)
        parts, expected = (checksum, data), _CHECKSUM_BYTES + size
        until_header = _RIEGELI_BLOCK - _CHECKSUM_BYTES - place % _RIEGELI_BLOCK
        if until_header < size:
            if until_header < 0:
                return self._read_by_library(block, size)  # the checksum itself is torn; one block in thousands
            header = bytearray(_RIEGELI_BLOCK_HEADER)
            parts = [checksum, data[:until_header]]
            for start in range(until_header, size, _RIEGELI_CONTENT):
                parts += [header, data[start : start + _RIEGELI_CONTENT]]
                expected += _RIEGELI_BLOCK_HEADER
        descriptor = self._open() if self._descriptor is None else self._descriptor
        try:
            count = os.preadv(descriptor, parts, place)
        except OSError as error:
            raise self._damaged(block, str(error.strerror)) from error
        if count != expected or xxh3_64_digest(data, block) != checksum:
            return self._read_by_library(block, size)
        return tokens

    def _open(self) -> int:
        with self._lock:
            if self._descriptor is None:
                try:
                    self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise UserError(
                        f"cannot open the token store's shard {self.path}: {error.strerror}; restore it from a copy, "
                        "or prepare the store again"
                    ) from error
            return self._descriptor

    def _read_by_library(self, block: int, length: int) -> np.ndarray:
        with self._lock:
            try:
                library = self._library or ArrayRecordReader(str(self.path), _READER_OPTIONS)
                self._library = library
                (record,) = library.read(block, block + 1)
            except (RuntimeError, ValueError, IndexError, OSError) as error:
                reason = " ".join(str(error).split())[:_REASON_LENGTH]
                raise self._damaged(block, f"it cannot be read: {reason}") from error
        data = memoryview(record)[_CHECKSUM_BYTES:]
        if len(data) != length:
            raise self._damaged(block, f"it has {len(data)} bytes instead of {length}")
        if xxh3_64_digest(data, block) != record[:_CHECKSUM_BYTES]:
            raise self._damaged(block, "its checksum is wrong")
        return np.frombuffer(data, self._dtype)

    def _damaged(self, block: int, reason: str) -> DamagedBlock:
        return DamagedBlock(
            f"block {block} of the token store's shard {self.path} is damaged: {reason}",
            "restore the file from a copy, prepare the store again, or set data.on_corrupt_block=skip to leave out the "
            "windows that touch the block",
        )
