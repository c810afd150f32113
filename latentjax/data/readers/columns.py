"""Columns of Arrow tables: which can hold documents, and the documents in them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from latentjax.data.readers.base import CorpusFile, Malformed, Piece, ReaderOptions, Span, pieces_of_ids, pieces_of_text
from latentjax.data.readers.values import BadDocument, ids_of, utf8
from latentjax.errors import UserError

# So much of a column is made into documents at a time.
BATCH_ROWS = 256
BATCH_BYTES = 4 << 20

_IDS = "input_ids"  # what data sets that are tokenised already call them


def check_field(names: list[str], kind: pa.DataType | None, field: str, path: str) -> None:
    """Checks that a table has a column that can hold documents.

    Args:
      names: of all columns.
      kind: type of column `field`; None if there is none.

    Raises:
      UserError: it has not.
    """
    if kind is None:
        hint = f" (it is tokenised already: set --text_field {_IDS})" if _IDS in names else ""
        raise UserError(f"{path}: no field {field!r}; it has {', '.join(map(repr, names)) or 'none'}{hint}")
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (_is_text(held) or (_is_list(held) and pa.types.is_integer(held.value_type))):
        raise UserError(f"{path}: field {field!r} is {held}, neither text nor lists of token ids")


def checked(column: pa.Array) -> pa.Array:
    """Returns a column that was mapped from a file, whose offsets have been made sure to lie within its data.

    What is in a file is taken as it is, and reading on from a wrong offset would end the process. Text comes back as
    bytes: whether it is UTF-8 is asked row by row.

    Raises:
      ArrowInvalid: it is damaged.
    """
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    column = column.view(kinds[column.type]) if column.type in kinds else column
    column.validate(full=True)
    return column


class Documents:
    """Makes documents of the rows of a span that come batch by batch."""

    def __init__(self, file: CorpusFile, span: Span, options: ReaderOptions, first_row: int, num_rows: int):
        """Begins with `first_row` of the file, to go on for `num_rows`."""
        self._path, self._options = file.path, options
        self._first_row, self._num_rows, self._row = first_row, num_rows, first_row
        self._total_bytes, self._used_bytes = span.input_bytes, 0

    def of(self, column: pa.Array) -> Iterator[Piece | Malformed]:
        """Yields the documents of the next rows."""
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if _is_text(column.type) and not pa.types.is_large_binary(column.type):
            column = column.cast(pa.large_binary())  # whether it is UTF-8 is asked row by row
        for start in range(0, len(column), BATCH_ROWS):
            for value in column.slice(start, BATCH_ROWS):
                source = f"{self._path}, row {self._row}"
                self._row += 1
                try:
                    yield from self._document(value, source)
                except BadDocument as error:
                    yield Malformed(source, str(error))

    def _document(self, value: pa.Scalar, source: str) -> Iterator[Piece]:
        field = self._options.text_field
        if not value.is_valid:
            raise BadDocument(f"field {field!r} is null")
        if isinstance(value, pa.LargeBinaryScalar):
            text = utf8(value.as_py(), field)
            yield from pieces_of_text(text, source, self._newly_used())
        else:
            if value.values.null_count:
                raise BadDocument(f"field {field!r} is a list with a null in it")
            ids = ids_of(value.values.to_numpy(zero_copy_only=False), field)
            yield from pieces_of_ids(ids, source, self._newly_used(), self._options.packed_rows)

    def _newly_used(self) -> int:
        """Returns the share of the span's bytes that the rows since the last good one have."""
        done = self._total_bytes * (self._row - self._first_row) // max(self._num_rows, 1)
        self._used_bytes, before = done, self._used_bytes
        return done - before


def group(number: int, file: CorpusFile, sizes: list[int], span_bytes: int) -> list[Span]:
    """Cuts a file into spans of whole parts: of so many that their `sizes` come to `span_bytes`."""
    spans, start, waiting, total, placed = [], 0, 0, max(sum(sizes), 1), 0
    for place, size in enumerate(sizes, start=1):
        waiting += size
        if waiting >= span_bytes or place == len(sizes):
            before, placed = placed, placed + waiting
            share = file.size * placed // total - file.size * before // total
            spans.append(Span(number, start, place, share))
            start, waiting = place, 0
    return spans or [Span(number, 0, 0, file.size)]


@contextmanager
def arrow_errors(path: str) -> Iterator[None]:
    """Makes a `UserError` of what pyarrow raises over a file."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read, or is damaged: {error}") from error


def _is_text(kind: pa.DataType) -> bool:
    kinds = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in kinds


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
