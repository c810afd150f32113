"""Tokens in the format of Megatron-LM and GPT-NeoX (MMapIndexedDataset), read in place.

PREFIX.bin holds the tokens of all sequences, PREFIX.idx where each lies, little-endian:

    9 bytes   MMIDIDX 0 0
    uint64    version, 1
    uint8     dtype of the tokens, see _DTYPES
    uint64    n, sequences
    uint64    m, entries of the document index
    int32[n]  length of each sequence in tokens
    int64[n]  place of each in PREFIX.bin, in bytes
    int64[m]  first sequence of each document; not needed here, documents end with a token
    int8[n]   modes, in files for several modalities only
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

from latentjax.data.row import TokenRow
from latentjax.errors import UserError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floating point
_SUFFIXES = (".bin", ".idx")

# The index of the Pile has 150 million sequences. It is looked through in chunks, and of one sequence in every so many
# the place of its first token is kept, from where the others are found. The first is a multiple of the second.
_CHUNK = 1 << 16
_KEPT = 1 << 10


class _Layout(NamedTuple):
    """What one pass over the index finds.

    Attributes:
      firsts: (n / _KEPT,) int64, the place in the row of the first token of sequences 0, _KEPT, 2 _KEPT, ...
      num_tokens: of all sequences.
      length: of every sequence, or None where they differ.
      start: byte of the first token where all sequences follow each other without gaps, or None.
    """

    firsts: np.ndarray
    num_tokens: int
    length: int | None
    start: int | None


def is_megatron(path: str | Path) -> bool:
    """Whether `path` is PREFIX, PREFIX.bin or PREFIX.idx of a Megatron data set (which may be a damaged one)."""
    path = Path(path).expanduser()
    if path.suffix in _SUFFIXES:
        return path.is_file() or _with_suffix(_prefix(path), ".idx").is_file()
    return not path.exists() and _with_suffix(path, ".idx").is_file()


class MegatronRow(TokenRow):
    """The sequences of a Megatron data set, one behind the other in the order of its index."""

    def __init__(self, path: str | Path, vocab_size: int):
        """Opens PREFIX, PREFIX.bin or PREFIX.idx, and looks through the index once.

        Args:
          path: of the data set.
          vocab_size: of its tokenizer, to which every token that is read is held.

        Raises:
          UserError: a file is missing, truncated or of another format.
        """
        prefix = _prefix(Path(path).expanduser())
        self.label = f"the Megatron data {prefix}"
        self._bin, self._idx = _with_suffix(prefix, ".bin"), _with_suffix(prefix, ".idx")
        self._vocab_size = vocab_size
        self._dtype, self.num_sequences = _read_header(self._idx)
        self._open()
        try:
            layout = _survey(self._idx, self.num_sequences, self._bin, os.fstat(self._tokens).st_size, self._dtype)
        except OSError as error:
            raise UserError(f"cannot read {self._idx}: {error.strerror or error}") from error
        self._firsts, self.num_tokens, self.sequence_tokens, self._start = layout

    def _open(self) -> None:
        try:
            self._tokens = os.open(self._bin, os.O_RDONLY | os.O_CLOEXEC)
            self._index = os.open(self._idx, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_tokens", "_index")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._open()

    def __del__(self):
        for name in ("_tokens", "_index"):
            if name in self.__dict__:
                os.close(self.__dict__[name])

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """See `TokenRow.read_windows`."""
        if len(starts) and (starts.min() < 0 or starts.max() + length > self.num_tokens):
            raise IndexError(f"{length} tokens from {starts.min()} to {starts.max()} of {self.num_tokens}")
        tokens = np.empty((len(starts), length), self._dtype)
        for row, start in zip(tokens, starts.tolist(), strict=True):
            if self._start is not None:
                self._read_into(row, self._start + start * self._dtype.itemsize)
            else:
                self._read_sequences_into(row, start)
        signed = self._dtype.kind == "i"
        if tokens.size and (tokens.max() >= self._vocab_size or (signed and tokens.min() < 0)):
            self._complain(tokens, starts)
        return tokens.astype(np.int32)

    def _read_sequences_into(self, row: np.ndarray, start: int) -> None:
        """Fills a row from as many sequences as it takes, wherever they lie."""
        sequence, skip = self._locate(start)
        filled = 0
        while filled < len(row):
            length = self.sequence_tokens or int(self._lengths(sequence, 1)[0])
            part = row[filled : filled + length - skip]
            if len(part):
                pointer = np.empty(1, "<i8")
                _read_into(pointer, self._index, _HEADER.size + 4 * self.num_sequences + 8 * sequence, self._idx)
                self._read_into(part, int(pointer[0]) + skip * self._dtype.itemsize)
            filled, sequence, skip = filled + len(part), sequence + 1, 0

    def _read_into(self, row: np.ndarray, offset: int) -> None:
        _read_into(row, self._tokens, offset, self._bin)

    def _lengths(self, first: int, count: int) -> np.ndarray:
        lengths = np.empty(min(count, self.num_sequences - first), "<i4")
        _read_into(lengths, self._index, _HEADER.size + 4 * first, self._idx)
        return lengths

    def _locate(self, place: int) -> tuple[int, int]:
        """Returns the sequence that holds a token of the row, and the token's place in it."""
        if self.sequence_tokens is not None:
            return divmod(place, self.sequence_tokens)
        # The last one kept that begins at or before it: those before that with the same first token are empty.
        kept = int(np.searchsorted(self._firsts, place, side="right")) - 1
        ends = int(self._firsts[kept]) + np.cumsum(self._lengths(kept * _KEPT, _KEPT), dtype=np.int64)
        inside = int(np.searchsorted(ends, place, side="right"))
        begin = int(ends[inside - 1]) if inside else int(self._firsts[kept])
        return kept * _KEPT + inside, place - begin

    def _complain(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        window, place = np.argwhere((tokens < 0) | (tokens >= self._vocab_size))[0].tolist()
        sequence, offset = self._locate(int(starts[window]) + place)
        raise UserError(
            f"{self._bin}: token {tokens[window, place]}, number {offset} of sequence {sequence}, is beyond the "
            f"tokenizer's vocabulary of {self._vocab_size}: set data.tokenizer to the one that the data was made with"
        )


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in _SUFFIXES else path


def _with_suffix(prefix: Path, suffix: str) -> Path:
    # Not Path.with_suffix: a prefix may have dots of its own.
    return prefix.with_name(prefix.name + suffix)


def _read_into(array: np.ndarray, file: int, offset: int, path: Path) -> None:
    # Not from a memory map: what was looked at once would count as this process's memory for as long as it lives.
    try:
        count = os.preadv(file, [array.data], offset)
    except OSError as error:
        raise UserError(f"cannot read {path} at byte {offset}: {error.strerror}") from error
    if count != array.nbytes:
        raise UserError(f"{path} is truncated: {count} bytes instead of {array.nbytes} at byte {offset}")


def _read_header(path: Path) -> tuple[np.dtype, int]:
    """Returns the dtype of the tokens and the number of sequences."""
    try:
        with path.open("rb") as file:
            header, size = file.read(_HEADER.size), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not header.startswith(_MAGIC):
        raise UserError(f"{path} is no index of Megatron data (MMapIndexedDataset): it begins with {header[:9]!r}")
    if len(header) < _HEADER.size:
        raise UserError(f"{path} is truncated: it has {size} bytes")
    _, version, code, sequences, documents = _HEADER.unpack(header)
    if version != 1:
        raise UserError(f"{path} has version {version} of the Megatron format, but latentjax reads version 1")
    if code not in _DTYPES:
        raise UserError(f"{path}: dtype {code} is not one of whole numbers, so these are no tokens")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):
        raise UserError(
            f"{path} is damaged: it has {size} bytes, but {sequences} sequences and {documents} entries of documents "
            f"take {expected}"
        )
    return np.dtype(_DTYPES[code]), sequences


def _survey(idx: Path, num_sequences: int, bin_path: Path, bin_size: int, dtype: np.dtype) -> _Layout:
    """Looks through the index, a chunk at a time.

    Raises:
      UserError: a length or place that cannot be, or beyond the end of PREFIX.bin.
    """
    firsts, total = [], 0
    length, start, end, uniform, contiguous = None, None, None, True, True
    for first in range(0, num_sequences, _CHUNK):
        count = min(_CHUNK, num_sequences - first)
        lengths = np.fromfile(idx, "<i4", count, offset=_HEADER.size + 4 * first).astype(np.int64)
        pointers = np.fromfile(idx, "<i8", count, offset=_HEADER.size + 4 * num_sequences + 8 * first)
        ends = pointers + lengths * dtype.itemsize
        # Places far beyond the file would wrap around when the lengths are added.
        bad = np.flatnonzero((lengths < 0) | (pointers < 0) | (pointers > 2**62))
        if bad.size:
            raise UserError(
                f"{idx} is damaged: sequence {first + bad[0]} has {lengths[bad[0]]} tokens at byte {pointers[bad[0]]}"
            )
        if ends.max() > bin_size:
            raise UserError(
                f"{bin_path} is truncated: it has {bin_size} bytes, but sequence {first + int(ends.argmax())} ends at "
                f"byte {ends.max()}"
            )
        if first == 0:
            length, start, end = int(lengths[0]), int(pointers[0]), int(pointers[0])
        uniform = uniform and bool((lengths == length).all())
        contiguous = contiguous and pointers[0] == end and bool((pointers[1:] == ends[:-1]).all())
        end = ends[-1]
        firsts.append((total + np.cumsum(lengths) - lengths)[::_KEPT].copy())  # a view would keep all of them
        total += int(lengths.sum())
    return _Layout(
        firsts=np.concatenate([np.zeros(0, np.int64), *firsts]),
        num_tokens=total,
        length=length if uniform and length else None,
        start=start if contiguous else None,
    )
