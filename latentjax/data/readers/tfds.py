"""Data sets of TensorFlow Datasets, prepared in the format ArrayRecord or Parquet. TensorFlow is not needed."""

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from latentjax.data.readers.base import (
    CorpusFile,
    LeftOut,
    Malformed,
    Piece,
    Reader,
    Span,
    pieces_of_ids,
    pieces_of_text,
)
from latentjax.data.readers.formats import TFDS
from latentjax.data.readers.values import BadDocument, ids_of, utf8
from latentjax.errors import UserError

_BATCH_EXAMPLES = 64
_BATCH_BYTES = 4 << 20


def corpus_file(path: str) -> CorpusFile:
    """Returns the one file, so to say, of the corpus `tfds:NAME/SPLIT`; its stamp is the version of the data set.

    Raises:
      UserError: the path is none, no such data set has been prepared, it has no such split, or tfds is missing.
    """
    builder, split = _builder(path)
    splits = builder.info.splits
    try:
        examples = splits[split].num_examples
    except ValueError as error:
        raise UserError(
            f"{path}: no split {split!r}: {_first_line(error)} (the splits are {', '.join(sorted(splits))})"
        ) from error
    if not examples:
        raise UserError(f"{path}: split {split!r} is empty")
    # A slice does not say its bytes: it is taken to have its share of all.
    all_examples = max(sum(each.num_examples for each in splits.values()), 1)
    size = sum(each.num_bytes for each in splits.values()) * examples // all_examples
    return CorpusFile(path.removeprefix(TFDS), path, size, builder.info.full_name, named=True)


class TfdsReader(Reader):
    """Reads a split, or a slice of one, by its examples."""

    def plan(self, number: int, file: CorpusFile, span_bytes: int) -> list[Span]:
        builder, _ = _builder(file.path)
        _check_field(builder.info.features, self.options.text_field, file.path)
        length = len(_examples(file.path, file.stamp, os.getpid()))
        step = max(1, length if file.size <= span_bytes else length * span_bytes // file.size)
        spans = []
        for start in range(0, max(length, 1), step):
            stop = min(start + step, length)
            share = file.size * stop // max(length, 1) - file.size * start // max(length, 1)
            spans.append(Span(number, start, stop, share))
        return spans

    def read(self, file: CorpusFile, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        examples = _examples(file.path, file.stamp, os.getpid())
        example_bytes = max(span.input_bytes // max(span.stop - span.start, 1), 1)
        step = max(1, min(_BATCH_EXAMPLES, _BATCH_BYTES // example_bytes))
        used = 0
        for start in range(span.start, span.stop, step):
            numbers = range(start, min(start + step, span.stop))
            try:
                batch = list(zip(numbers, examples.__getitems__(list(numbers)), strict=True))
            except Exception as error:  # the library and those below it have no common one
                raise UserError(
                    f"{file.path}: cannot read examples {start} to {numbers[-1]}: {type(error).__name__}: {error}"
                ) from error
            for number, example in batch:
                source = f"{file.path}, example {number}"
                done = span.input_bytes * (number + 1 - span.start) // (span.stop - span.start)
                try:
                    yield from self._document(example[self.options.text_field], source, done - used)
                    used = done
                except BadDocument as error:
                    yield Malformed(source, str(error))

    def _document(self, value: Any, source: str, input_bytes: int) -> Iterator[Piece]:
        field = self.options.text_field
        if isinstance(value, bytes):
            yield from pieces_of_text(utf8(value, field), source, input_bytes)
        else:
            ids = ids_of(np.asarray(value) if len(value) else np.zeros(0, np.int64), field)
            yield from pieces_of_ids(ids, source, input_bytes, self.options.packed_rows)


def _check_field(features: Any, field: str, path: str) -> None:
    if field not in features:
        hint = " (it is tokenised already: set --text_field input_ids)" if "input_ids" in features else ""
        raise UserError(f"{path}: no field {field!r}; it has {', '.join(map(repr, sorted(features)))}{hint}")
    feature = features[field]
    shape, dtype = feature.shape, feature.np_dtype
    if not ((shape == () and dtype.kind in "OSU") or (len(shape) == 1 and dtype.kind in "iu")):
        raise UserError(f"{path}: field {field!r} is {feature}, neither text nor lists of token ids")


def _builder(path: str) -> tuple[Any, str]:
    """Returns the builder of a data set that has been prepared, from its files alone, and the split."""
    name, _, split = path.removeprefix(TFDS).rpartition("/")
    if not name or not split:
        raise UserError(f"{path}: write tfds:NAME/SPLIT, such as tfds:lm1b/train")
    try:
        from tensorflow_datasets.core import read_only_builder, registered  # slow to import
    except ImportError as error:
        package = "tensorflow-datasets"
        raise UserError(f"reading tfds: paths needs the package {package}: pip install {package}") from error
    directory = os.environ.get("TFDS_DATA_DIR")  # which the library looks at once, when it is imported
    place = {"data_dir": os.path.expanduser(directory)} if directory else {}
    try:
        # Not `tfds.builder`: that imports the code of the data set, and with it perhaps TensorFlow.
        return read_only_builder.builder_from_files(name, **place), split
    except registered.DatasetNotFoundError as error:
        raise UserError(
            f"{path}: no data set {name!r} has been prepared ({_first_line(error)}): prepare it with "
            f"`tfds build {name} --file_format=array_record` (TFDS_DATA_DIR says where), or give NAME/CONFIG:VERSION"
        ) from error
    except Exception as error:  # what stands there is damaged, or of another version of the library
        raise UserError(f"{path}: cannot be opened: {type(error).__name__}: {_first_line(error)}") from error


@functools.lru_cache(maxsize=1)
def _examples(path: str, stamp: str, process: int) -> Any:
    """Opens the examples of a split; a forked process must not share the open files of its parent."""
    builder, split = _builder(path)
    try:
        return builder.as_data_source(split=split)
    except NotImplementedError as error:
        raise UserError(
            f"{path}: was prepared in a format without random access: prepare it anew with "
            f"`tfds build {path.removeprefix(TFDS).rpartition('/')[0]} --file_format=array_record`"
        ) from error
    except Exception as error:
        raise UserError(f"{path}: cannot be opened: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
