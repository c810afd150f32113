"""Which reader reads a file: by the end of its name. A new format is one module and one line here."""

import importlib
import os

from latentjax.data.readers.base import CorpusFile, Reader, ReaderOptions
from latentjax.data.readers.compressed import compression_of
from latentjax.errors import UserError

TFDS = "tfds:"

# Module and class by the end of the name; any other file is text. Modules are imported when such a file is met: some
# need packages that are slow to import.
_READERS = {
    ".jsonl": ("json_lines", "JsonLinesReader"),
    ".ndjson": ("json_lines", "JsonLinesReader"),
    ".parquet": ("parquet", "ParquetReader"),
    ".arrow": ("arrow", "ArrowReader"),
}
# The same for compressed files, by what stands before `.gz`, `.zst` or `.zstd`. JSON here is JSON lines (so C4 and many
# others name them); a plain `.json` file is text, such as those among source code.
_COMPRESSED_READERS: dict[str, tuple[str, str]] = dict.fromkeys((".jsonl", ".ndjson", ".json"), _READERS[".jsonl"])
_TEXT = ("text", "TextReader")


def reader_for(file: CorpusFile, options: ReaderOptions) -> Reader:
    """Returns what reads a file.

    Raises:
      UserError: a package that its format needs is missing.
    """
    if file.path.startswith(TFDS):
        module, reader = "tfds", "TfdsReader"
    else:
        stem, suffix = os.path.splitext(file.path.lower())
        if compression_of(file.path) is None:
            module, reader = _READERS.get(suffix, _TEXT)
        else:
            module, reader = _COMPRESSED_READERS.get(os.path.splitext(stem)[1], _TEXT)
    try:
        return getattr(importlib.import_module(f"latentjax.data.readers.{module}"), reader)(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(f"reading {file.path} needs the package {package}: pip install {package}") from error
