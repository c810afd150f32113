"""Parquet files, saved Hugging Face data sets and TensorFlow data sets."""

import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import REPOSITORY, documents_of, joined, malformed_in, open_corpus, read

from latentjax.data.readers import columns
from latentjax.data.readers.base import Malformed, Span
from latentjax.errors import UserError

SPAN_BYTES = [1, 7, 100, 5000, 1 << 30]
TEXTS = ["", "zwölf 🙂\r\n", "no line break", "\n", *(f"document {number} " * (number % 50) for number in range(1000))]
IDS = [[], [1, 2, 3], *(list(range(number % 7)) for number in range(500))]


def write_parquet(path, table, **options):
    pq.write_table(table, path, **options)
    return path


# -- Parquet


@pytest.mark.parametrize("kind", ["string", "large_string", "binary", "large_binary", "string_view", "dictionary"])
def test_a_parquet_row_is_a_document(tmp_path, kind):
    column = pa.array(TEXTS, pa.string())
    kinds = {"dictionary": pa.dictionary(pa.int32(), pa.string()), "string_view": pa.string_view()}
    column = column.cast(kinds.get(kind) or getattr(pa, kind)())
    table = pa.table({"id": list(range(len(TEXTS))), "body": column})
    path = write_parquet(tmp_path / "a.parquet", table, row_group_size=30)
    corpus = open_corpus(path, text_field="body")
    for span_bytes in SPAN_BYTES:
        items = read(corpus, span_bytes)
        assert joined(items) == TEXTS
        assert [item.source for item in items] == [f"{path}, row {row}" for row in range(len(TEXTS))]
        assert sum(item.input_bytes for item in items) == path.stat().st_size
    groups = -(-len(TEXTS) // 30)
    assert [(span.start, span.stop) for span in corpus.spans(1)] == [(place, place + 1) for place in range(groups)]
    assert len(corpus.spans(1 << 30)) == 1
    sizes = [pq.ParquetFile(path).metadata.row_group(place).total_byte_size for place in range(groups)]
    for span in corpus.spans(5000)[:-1]:
        assert sum(sizes[span.start : span.stop]) >= 5000 > sum(sizes[span.start : span.stop - 1])


@pytest.mark.parametrize("kind", [pa.list_(pa.int32()), pa.large_list(pa.uint16()), pa.list_(pa.int64())])
def test_a_parquet_row_can_be_token_ids(tmp_path, kind):
    path = write_parquet(tmp_path / "a.parquet", pa.table({"input_ids": pa.array(IDS, kind)}), row_group_size=17)
    for span_bytes in SPAN_BYTES:
        assert documents_of(open_corpus(path, text_field="input_ids"), span_bytes) == IDS
    pieces = read(open_corpus(path, text_field="input_ids", packed_rows=True))
    assert {piece.content.dtype for piece in pieces} == {np.dtype(kind.value_type.to_pandas_dtype())}
    assert not any(piece.is_last for piece in pieces)


def test_bad_parquet_rows_are_passed_over_and_named(tmp_path):
    table = pa.table({"text": pa.array([b"a", None, b"b\xff", b"c"] * 20, pa.binary())})
    path = write_parquet(tmp_path / "a.parquet", table, row_group_size=10)
    for span_bytes in (1, 1 << 30):
        items = read(open_corpus(path), span_bytes)
        assert joined(items) == ["a", "c"] * 20
        assert malformed_in(items)[-2:] == [
            Malformed(f"{path}, row 77", "field 'text' is null"),
            Malformed(f"{path}, row 78", "field 'text' is not UTF-8 text (byte 0xff at 1)"),
        ]
    table = pa.table({"ids": pa.array([[1, None], [-5, 2], [3], None], pa.list_(pa.int64()))})
    path = write_parquet(tmp_path / "b.parquet", table)
    items = read(open_corpus(path, text_field="ids"))
    assert joined(items) == [[3]]
    assert [item.reason for item in malformed_in(items)] == [
        "field 'ids' is a list with a null in it",
        "field 'ids' holds the negative token id -5",
        "field 'ids' is null",
    ]


def test_a_parquet_file_without_the_field_or_of_another_type(tmp_path):
    table = pa.table({"id": [1], "input_ids": [[1.5]], "meta": [{"text": "a"}]})
    path = write_parquet(tmp_path / "a.parquet", table)
    tokenised = (
        r"no field 'text'; it has 'id', 'input_ids', 'meta' \(it is tokenised already: set --text_field input_ids\)"
    )
    with pytest.raises(UserError, match=tokenised):
        open_corpus(path).spans(100)
    for field, kind in (("id", "int64"), ("input_ids", "list<.*double>"), ("meta", "struct<.*>")):
        with pytest.raises(UserError, match=f"field {field!r} is {kind}, neither text nor lists of token ids"):
            open_corpus(path, text_field=field).spans(100)


def test_a_parquet_file_without_rows_has_an_empty_span(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": pa.array([], pa.string())}))
    for span_bytes in (1, 1 << 20):
        assert read(open_corpus(path), span_bytes) == []


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    texts = ["".join(random.Random(row).choices("abcdefgh ", k=2000)) for row in range(100)]
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": texts}), row_group_size=10, use_dictionary=False)
    corpus = open_corpus(path)
    spans = corpus.spans(1)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match=r"a.parquet: cannot be read, or is damaged"):
        corpus.spans(1)
    data[20_000:30_000] = bytes(10_000)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.parquet: cannot be read, or is damaged"):
        for span in spans:
            list(corpus.read(span))
    path.unlink()
    with pytest.raises(UserError, match=r"cannot read .*a.parquet"):
        list(corpus.read(spans[0]))


def test_a_large_row_group_is_streamed(tmp_path):
    rows = 3000
    texts = [f"{row} " + "Der König hatte zwölf Töchter. " * 1500 for row in range(rows)]
    path = write_parquet(tmp_path / "a.parquet", pa.table({"text": texts}), row_group_size=rows, write_batch_size=10)
    corpus = open_corpus(path)
    (span,) = corpus.spans(1)
    pa.default_memory_pool().release_unused()
    before, most, number = pa.total_allocated_bytes(), 0, -1
    for number, piece in enumerate(corpus.read(span)):
        assert piece.content.startswith(f"{number} Der König")
        most = max(most, pa.total_allocated_bytes() - before)
    assert number == rows - 1
    assert sum(map(len, texts)) > 130e6
    assert most < 30e6


def test_parts_are_grouped_to_about_the_bytes_of_a_span(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    (file,) = open_corpus(path).files
    spans = columns.group(3, file, [10, 20, 50, 5, 15], 30)
    assert spans == [Span(3, 0, 2, 300), Span(3, 2, 3, 500), Span(3, 3, 5, 200)]
    assert columns.group(3, file, [], 30) == [Span(3, 0, 0, 1000)]
    assert [span.input_bytes for span in columns.group(3, file, [0, 0], 0)] == [0, 0]


# -- data sets saved by Hugging Face datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A data set of 12 shards and a dictionary of two."""
    import datasets

    datasets.disable_progress_bars()
    root = tmp_path_factory.mktemp("datasets")
    rows = datasets.Dataset.from_dict(
        {"text": TEXTS, "input_ids": [[row % 5] * (row % 3) for row in range(len(TEXTS))]}
    )
    rows.save_to_disk(root / "one", num_shards=12)
    rows.save_to_disk(root / "whole")
    rows = rows.remove_columns("text")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(100, 50, -1))}).save_to_disk(root / "two")
    return root


def test_a_saved_data_set_is_read_in_its_order(saved):
    corpus = open_corpus(saved / "one", include=["**/*.txt"])
    assert [file.name for file in corpus.files] == [f"data-{number:05}-of-00012.arrow" for number in range(12)]
    for span_bytes in SPAN_BYTES:
        assert documents_of(corpus, span_bytes) == TEXTS
    ids = documents_of(open_corpus(saved / "one", text_field="input_ids"))
    assert ids == [[row % 5] * (row % 3) for row in range(len(TEXTS))]


def test_the_record_batches_of_a_file_are_spans(saved):
    corpus = open_corpus(saved / "whole")
    assert [(span.start, span.stop) for span in corpus.spans(1)] == [
        (0, 1),
        (1, 2),
    ]  # datasets writes 1,000 rows in each
    assert len(corpus.spans(1 << 30)) == 1
    for span_bytes in (1, 1 << 30):
        items = read(corpus, span_bytes)
        assert joined(items) == TEXTS
        assert items[-1].source == f"{corpus.files[0].path}, row {len(TEXTS) - 1}"
        assert sum(item.input_bytes for item in items) == corpus.total_bytes
    (second,) = corpus.spans(1)[1:]
    assert joined(list(corpus.read(second))) == TEXTS[1000:]


def test_the_splits_of_a_data_set_dictionary_are_named(saved):
    with pytest.raises(UserError, match=rf"splits train, test: give one of them, such as {saved}/two/train"):
        open_corpus(saved / "two")
    with pytest.raises(UserError, match=r"no field 'text'; it has 'input_ids' \(.* set --text_field input_ids\)"):
        open_corpus(saved / "two/test").spans(100)
    ids = documents_of(open_corpus(saved / "two/test", text_field="input_ids"))
    assert ids == [[row % 5] * (row % 3) for row in range(100, 50, -1)]


def test_a_damaged_or_incomplete_saved_data_set_is_an_error(saved, tmp_path):
    data = (saved / "whole/data-00000-of-00001.arrow").read_bytes()
    path = tmp_path / "a.arrow"
    path.write_bytes(data)
    corpus = open_corpus(path)
    assert documents_of(corpus) == TEXTS
    spans = corpus.spans(1)
    for length in (0, 3, 1000, len(data) // 2, len(data) - 1000):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="a.arrow: cannot be read, or is damaged"):
            corpus.spans(1)
        with pytest.raises(UserError, match="a.arrow: cannot be read, or is damaged"):
            list(corpus.read(spans[-1]))
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}]}')
    with pytest.raises(UserError, match=r"cannot read .*b.arrow: no such file"):
        open_corpus(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{}]}')
    with pytest.raises(UserError, match="load and save it anew"):
        open_corpus(tmp_path)
    (tmp_path / "state.json").write_text("[]")  # not such a data set: a directory as any other
    assert [file.name for file in open_corpus(tmp_path).files] == ["a.arrow", "state.json"]


# -- TensorFlow Datasets

_BUILD = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="de"), tfds.core.BuilderConfig(name="en")]

    def _info(self):
        features = {
            "text": tfds.features.Text(), "number": tfds.features.Scalar(np.int64),
            "tensor": tfds.features.Tensor(shape=(None,), dtype=np.int64),
            "sequence": tfds.features.Sequence(np.int32),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples(0, 200), "test": self._generate_examples(200, 230)}

    def _generate_examples(self, start, stop):
        for row in range(start, stop):
            ids = list(range(row % 4))
            text = f"{self.builder_config.name} zw\\u00f6lf {row}" * (row % 5)
            yield row, {"text": text, "number": row, "tensor": np.array(ids, np.int64), "sequence": ids}

Tiny(data_dir=sys.argv[1], config="de", file_format="array_record").download_and_prepare()
"""

_READ = """
import json, sys
from latentjax.data.corpus import Corpus
from latentjax.data.readers.base import ReaderOptions

corpus = Corpus(sys.argv[1], [], [], ReaderOptions(sys.argv[2], False))
found = [[(piece.content if isinstance(piece.content, str) else piece.content.tolist(), piece.source)
          for span in corpus.spans(span_bytes) for piece in corpus.read(span)] for span_bytes in (1, 300, 1 << 30)]
assert "tensorflow" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def tfds_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    subprocess.run([sys.executable, "-c", _BUILD, str(directory)], check=True, capture_output=True, timeout=300)
    return directory


@pytest.fixture
def prepared(tfds_directory, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_directory))


def expected_texts(rows):
    return sorted(f"de zwölf {row}" * (row % 5) for row in rows)


def test_a_tensorflow_data_set_is_read_by_its_examples(prepared):
    corpus = open_corpus("tfds:tiny/de:1.2.0/train")
    (file,) = corpus.files
    assert (file.name, file.path, file.stamp) == ("tiny/de:1.2.0/train", "tfds:tiny/de:1.2.0/train", "tiny/de/1.2.0")
    whole = documents_of(corpus)
    assert sorted(whole) == expected_texts(range(200))
    assert 0 < corpus.total_bytes < 100_000
    for span_bytes in SPAN_BYTES:
        items = read(corpus, span_bytes)
        assert joined(items) == whole
        assert [item.source for item in items] == [f"{file.path}, example {number}" for number in range(200)]
        assert sum(item.input_bytes for item in items) == file.size
    assert len(corpus.spans(1)) == 200
    assert len(corpus.spans(file.size // 3)) in (3, 4)
    assert sorted(documents_of(open_corpus("tfds:tiny/de/test"))) == expected_texts(range(200, 230))


def test_a_slice_of_a_split_is_its_own_corpus(prepared):
    whole = documents_of(open_corpus("tfds:tiny/de/train"))
    for part, expected in (("[:10%]", whole[:20]), ("[50:53]", whole[50:53]), ("[-2:]", whole[-2:])):
        corpus = open_corpus(f"tfds:tiny/de/train{part}")
        for span_bytes in SPAN_BYTES:
            assert documents_of(corpus, span_bytes) == expected
    assert open_corpus("tfds:tiny/de/train[:10%]").total_bytes * 10 == pytest.approx(
        open_corpus("tfds:tiny/de/train").total_bytes, abs=10
    )


def test_integer_features_are_token_ids(prepared):
    for field in ("tensor", "sequence"):
        ids = documents_of(open_corpus("tfds:tiny/de/test", text_field=field), 100)
        assert sorted(ids) == sorted(list(range(row % 4)) for row in range(200, 230))


def test_tensorflow_is_not_imported(tfds_directory):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TFDS_DATA_DIR": str(tfds_directory)}
    command = [sys.executable, "-c", _READ, "tfds:tiny/de/test", "text"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    first, *others = json.loads(run.stdout)
    assert sorted(text for text, _ in first) == expected_texts(range(200, 230))
    assert others == [first, first]


@pytest.mark.parametrize(
    "path, message",
    [
        ("tfds:tiny", "write tfds:NAME/SPLIT, such as tfds:lm1b/train"),
        ("tfds:tiny/", "write tfds:NAME/SPLIT"),
        (
            "tfds:absent/train",
            r"no data set 'absent' has been prepared \(.*\): prepare it with `tfds build absent --file",
        ),
        ("tfds:tiny/fr/train", "no data set 'tiny/fr' has been prepared"),
        ("tfds:tiny/de:9.0.0/train", "no data set 'tiny/de:9.0.0' has been prepared"),
        ("tfds:tiny/de/validation", r"no split 'validation': .* \(the splits are test, train\)"),
        ("tfds:tiny/de/train[x]", r"no split 'train\[x\]'"),
        ("tfds:tiny/de/train[5:5]", r"split 'train\[5:5\]' is empty"),
    ],
)
def test_what_is_not_there_is_said(prepared, path, message):
    with pytest.raises(UserError, match=message):
        open_corpus(path).spans(100)


def test_features_that_are_no_documents_are_refused(prepared):
    with pytest.raises(UserError, match="no field 'body'; it has 'number', 'sequence', 'tensor', 'text'"):
        open_corpus("tfds:tiny/de/train", text_field="body").spans(100)
    with pytest.raises(UserError, match="field 'number' is Scalar.*, neither text nor lists of token ids"):
        open_corpus("tfds:tiny/de/train", text_field="number").spans(100)


def test_a_format_without_random_access_is_refused(tfds_directory, tmp_path, monkeypatch):
    shutil.copytree(tfds_directory, tmp_path / "copy")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    (path,) = (tmp_path / "copy").rglob("dataset_info.json")
    path.write_text(path.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"prepare it anew with `tfds build tiny/de --file_format=array_record`"):
        open_corpus("tfds:tiny/de/train").spans(100)


def test_without_the_package_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets.core", None)
    with pytest.raises(UserError, match="needs the package tensorflow-datasets: pip install tensorflow-datasets"):
        open_corpus("tfds:tiny/de/train")


def test_a_damaged_tensorflow_data_set_is_an_error(tfds_directory, tmp_path, monkeypatch):
    shutil.copytree(tfds_directory, tmp_path / "copy")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "copy"))
    (path,) = (tmp_path / "copy").rglob("*train.array_record*")
    data = path.read_bytes()
    path.write_bytes(data[:3000] + bytes(500) + data[3500:])
    with pytest.raises(UserError, match=r"tfds:tiny/de:1.\*.\*/train: cannot"):
        read(open_corpus("tfds:tiny/de:1.*.*/train"))
    (path.parent / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"tfds:tiny/de/train: cannot be opened"):
        open_corpus("tfds:tiny/de/train")
