"""Parquet files: every row is a document, the text or the token ids in one column."""

from collections.abc import Iterator

import pyarrow.parquet as pq

from latentjax.data import remote
from latentjax.data.readers.base import CorpusFile, LeftOut, Malformed, Piece, Reader, Span
from latentjax.data.readers.columns import BATCH_BYTES, BATCH_ROWS, Documents, arrow_errors, check_field, group


class ParquetReader(Reader):
    """Reads Parquet by row groups, the unit of its spans. The files of others have large ones: they are streamed."""

    def plan(self, number: int, file: CorpusFile, span_bytes: int) -> list[Span]:
        with arrow_errors(file.path), _open(file) as table:
            field, schema = self.options.text_field, table.schema_arrow
            kind = schema.field(field).type if field in schema.names else None
            check_field(schema.names, kind, field, file.path)
            groups = map(table.metadata.row_group, range(table.metadata.num_row_groups))
            return group(number, file, [each.total_byte_size for each in groups], span_bytes)

    def read(self, file: CorpusFile, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        field = self.options.text_field
        with arrow_errors(file.path), _open(file) as table:
            groups = [table.metadata.row_group(place) for place in range(span.stop)]
            rows_before = sum(each.num_rows for each in groups[: span.start])
            groups = groups[span.start :]
            num_rows = sum(each.num_rows for each in groups)
            documents = Documents(file, span, self.options, rows_before, num_rows)
            if not num_rows:
                return
            row_bytes = max(sum(each.total_byte_size for each in groups) // num_rows, 1)
            batches = table.iter_batches(
                batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES // row_bytes)),
                row_groups=list(range(span.start, span.stop)),
                columns=[field],
                use_threads=False,  # there are processes enough
            )
            for batch in batches:
                yield from documents.of(batch.column(field))


def _open(file: CorpusFile) -> pq.ParquetFile:
    source = remote.open_binary(file.path) if remote.is_remote(file.path) else file.path
    # A buffer size: else a whole row group's column is read before its first row comes out.
    return pq.ParquetFile(source, pre_buffer=False, buffer_size=remote.BUFFER_BYTES)
