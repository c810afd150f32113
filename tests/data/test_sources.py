"""What the config names is opened: one store or a mixture, Megatron data, and what to evaluate on."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from megatron_files import write
from rows import ArrayRow

from latentjax.config import default
from latentjax.data import sources
from latentjax.data.megatron import MegatronRow
from latentjax.data.sources import open_sources
from latentjax.errors import UserError

T = 8


@dataclass
class FakeStore:
    """A token store without files; `fingerprint` is its tokenizer's."""

    path: str
    fingerprint: str = "aa"
    num_tokens: int = 100

    def __post_init__(self):
        self.tokenizer = SimpleNamespace(fingerprint=self.fingerprint, vocab_size=500, eod_id=0)

    def split(self, name):
        """Rows tell the splits apart."""
        size = self.num_tokens if name == "train" else self.num_tokens // 5
        return ArrayRow(np.arange(size), f"the {name} split of {self.path}")


@pytest.fixture
def stores(monkeypatch):
    """{path: store}, opened in place of real ones."""
    stores = {}

    def resolve(path, data, progress):
        if path not in stores:
            raise UserError(f"there is nothing at {path}")
        return stores[path]

    monkeypatch.setattr(sources, "resolve_store", resolve)
    monkeypatch.setattr(sources, "given_tokenizer", lambda data: FakeStore("", "aa").tokenizer)
    for name in ("web", "books/part.1", "other/part.1"):
        stores[f"stores/{name}"] = FakeStore(f"stores/{name}")
    stores["stores/foreign"] = FakeStore("stores/foreign", "bb")
    stores["stores/tiny"] = FakeStore("stores/tiny", num_tokens=5 * T)
    stores["raw.txt"] = FakeStore("cache/raw-0123")
    return stores


@pytest.fixture
def pythia(tmp_path):
    """The prefix of Megatron data of 12 packed sequences."""
    write(tmp_path / "pythia", np.arange(12 * (T + 1)).reshape(12, T + 1).tolist())
    return str(tmp_path / "pythia")


@pytest.fixture
def data(stores):
    data = default().data
    data.sequence_length = T
    return data


def labels(rows):
    return {name: row.label for name, row in rows.items()}


def test_one_store(data):
    data.path = "stores/web"
    opened = open_sources(data, progress=False, needs_evaluation=True)
    ((row, weight),) = opened.train
    assert (row.label, weight) == ("the train split of stores/web", 1.0)
    assert labels(opened.eval_sets) == {"heldout": "the eval split of stores/web"}
    assert (opened.vocab_size, opened.eod_id, opened.tokenizer.fingerprint) == (500, 0, "aa")
    assert opened.description == "100 tokens in stores/web"


def test_a_raw_corpus_is_described_by_the_store_made_of_it(data):
    data.path = "raw.txt"
    assert open_sources(data, progress=False, needs_evaluation=False).description == "100 tokens in cache/raw-0123"


def test_a_mixture_evaluates_on_what_each_holds_out(data):
    """Under the last parts of their paths, made into names, each another; a store in it twice is evaluated once."""
    data.mixture = (
        ("stores/web", 3),
        ("stores/books/part.1", 0.5),
        ("stores/other/part.1", 0.25),
        ("stores/web", 0.25),
    )
    opened = open_sources(data, progress=False, needs_evaluation=True)
    assert [(row.label, weight) for row, weight in opened.train] == [
        (f"the train split of {path}", weight) for path, weight in data.mixture
    ]
    assert labels(opened.eval_sets) == {
        "web": "the eval split of stores/web",
        "part-1": "the eval split of stores/books/part.1",
        "part-1-2": "the eval split of stores/other/part.1",
    }
    assert opened.description.startswith(
        "75% from 100 tokens in stores/web, 12.5% from 100 tokens in stores/books/part.1, "
    )


def test_named_sets_to_evaluate_on(data, pythia):
    """Instead of what is held out of the training data; of Megatron data all."""
    data.path = "stores/web"
    data.eval_sets = (("books", "stores/books/part.1"), ("same", "stores/web"), ("packed", pythia + ".bin"))
    opened = open_sources(data, progress=False, needs_evaluation=True)
    assert labels(opened.eval_sets) == {
        "books": "the eval split of stores/books/part.1",
        "same": "the eval split of stores/web",
        "packed": f"the Megatron data {pythia}",
    }
    assert opened.eval_sets["packed"].num_tokens == 12 * (T + 1)


def test_sets_are_not_opened_where_nothing_is_evaluated(data):
    data.path, data.eval_sets = "stores/web", (("none", "stores/missing"),)
    assert open_sources(data, progress=False, needs_evaluation=False).eval_sets == {}
    with pytest.raises(UserError, match="there is nothing at stores/missing"):
        open_sources(data, progress=False, needs_evaluation=True)


def test_megatron_data(data, pythia):
    data.path = pythia
    opened = open_sources(data, progress=False, needs_evaluation=False)
    ((row, _),) = opened.train
    assert isinstance(row, MegatronRow) and row.sequence_tokens == T + 1
    assert opened.vocab_size == 500 and opened.description == f"108 tokens in {pythia}"
    with pytest.raises(
        UserError, match=r"held out of Megatron data: .* data\.eval_sets, or set train\.eval_every_steps=0"
    ):
        open_sources(data, progress=False, needs_evaluation=True)


def test_megatron_data_beside_a_store(data, pythia):
    data.mixture = ((pythia, 0.9), ("stores/web", 0.1))
    opened = open_sources(data, progress=False, needs_evaluation=True)
    assert labels(opened.eval_sets) == {"heldout": "the eval split of stores/web"}


def test_tokens_beyond_the_given_tokenizer(data, tmp_path):
    write(tmp_path / "data", [[499] * 9, [500] * 9])
    data.path = str(tmp_path / "data")
    ((row, _),) = open_sources(data, progress=False, needs_evaluation=False).train
    row.read(0, 9)
    with pytest.raises(
        UserError, match="token 500, number 0 of sequence 1, is beyond the tokenizer's vocabulary of 500"
    ):
        row.read(9, 1)


def test_different_tokenizers(data, pythia):
    """In a mixture, in what is evaluated on, and of Megatron data."""
    for mixture, eval_sets in (
        ((("stores/web", 1), ("stores/foreign", 1)), ()),
        ((("stores/web", 1),), (("x", "stores/foreign"),)),
    ):
        data.mixture, data.eval_sets = mixture, eval_sets
        with pytest.raises(UserError, match="stores/web and stores/foreign have different tokenizers"):
            open_sources(data, progress=False, needs_evaluation=True)
    data.mixture, data.eval_sets = (("stores/foreign", 1), (pythia, 1)), ()
    with pytest.raises(UserError, match="stores/foreign and .*/pythia have different tokenizers"):
        open_sources(data, progress=False, needs_evaluation=True)


def test_too_few_tokens_anywhere(data):
    data.path, data.sequence_length = "stores/tiny", T
    with pytest.raises(UserError, match="the eval split of stores/tiny has 8 tokens, fewer than one window .* 9"):
        open_sources(data, progress=False, needs_evaluation=True)
