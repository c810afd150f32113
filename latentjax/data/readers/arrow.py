"""Arrow files, as the library datasets saves them: every row is a document, the text or the token ids in one column."""

from collections.abc import Iterator

import pyarrow as pa

from latentjax.data import remote
from latentjax.data.readers.base import CorpusFile, LeftOut, Malformed, Piece, Reader, Span
from latentjax.data.readers.columns import Documents, arrow_errors, check_field, checked, group


class ArrowReader(Reader):
    """Reads streams of Arrow record batches, the unit of its spans."""

    def plan(self, number: int, file: CorpusFile, span_bytes: int) -> list[Span]:
        with arrow_errors(file.path):
            batches = _open(file)
            field, schema = self.options.text_field, batches.schema
            kind = schema.field(field).type if field in schema.names else None
            check_field(schema.names, kind, field, file.path)
            return group(number, file, [batch.nbytes for batch in batches], span_bytes)

    def read(self, file: CorpusFile, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        with arrow_errors(file.path):
            rows_before = 0
            for place, batch in enumerate(_open(file)):
                if place >= span.stop:
                    return
                if place >= span.start:
                    share = self._share(span, place)
                    documents = Documents(file, share, self.options, rows_before, batch.num_rows)
                    yield from documents.of(checked(batch.column(self.options.text_field)))
                rows_before += batch.num_rows

    @staticmethod
    def _share(span: Span, place: int) -> Span:
        """Returns the part of a span that is one batch, as if all were of one size."""
        parts = span.stop - span.start
        before, after = (span.input_bytes * (place + more - span.start) // parts for more in (0, 1))
        return Span(span.file, place, place + 1, after - before)


def _open(file: CorpusFile) -> pa.ipc.RecordBatchStreamReader:
    # Of a mapped file, what is passed over is not read.
    is_remote = remote.is_remote(file.path)
    source = pa.PythonFile(remote.open_binary(file.path)) if is_remote else pa.memory_map(file.path)
    return pa.ipc.open_stream(source)
