"""From the config to the rows of tokens that a run reads: token stores, raw corpora and Megatron data sets."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ml_collections import ConfigDict

from latentjax.data.megatron import MegatronRow, is_megatron
from latentjax.data.remote import is_remote, reading
from latentjax.data.resolve import given_tokenizer, resolve_store
from latentjax.data.row import TokenRow
from latentjax.data.store import SPLITS, TokenStore
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.data.windows import Windows
from latentjax.errors import UserError

_HELD_OUT = "heldout"


@dataclass(frozen=True)
class Sources:
    """All that a run reads, in ids of one tokenizer.

    Attributes:
      train: rows, each with its weight.
      eval_sets: held-out rows by name; empty where evaluation is not needed.
      description: what is trained on, for a message.
    """

    train: tuple[tuple[TokenRow, float], ...]
    eval_sets: dict[str, TokenRow]
    tokenizer: Tokenizer
    vocab_size: int
    eod_id: int
    description: str


def open_sources(data: ConfigDict, progress: bool, needs_evaluation: bool) -> Sources:
    """Opens what `data.path` or `data.mixture`, and `data.eval_sets`, name; makes stores of raw corpora.

    Without `data.eval_sets`, evaluation is on what the training stores hold out: one is called `heldout`, those of a
    mixture after the last part of their paths.

    Args:
      data: the `data` group of a config.
      progress: whether to show the making of stores on stderr.
      needs_evaluation: whether there must be something to evaluate on.

    Raises:
      UserError: whatever is wrong with one of them; stores of different tokenizers; fewer tokens than a window of
        `data.sequence_length`; nothing held out where it is needed.
    """
    opened = _Opened(data, progress)
    mixture = data.mixture or ((data.path, 1.0),)
    train = tuple((opened.row(path, "train"), float(weight)) for path, weight in mixture)
    eval_sets = {}
    if needs_evaluation:
        named = data.eval_sets or opened.held_out([path for path, _ in mixture])
        eval_sets = {name: opened.row(path, "eval") for name, path in named}
        if not eval_sets:
            raise UserError(
                "nothing is held out of Megatron data: name something to evaluate on in data.eval_sets, or set "
                "train.eval_every_steps=0"
            )
    for row in (*(row for row, _ in train), *eval_sets.values()):
        Windows(row, data.sequence_length)  # long before the first evaluation would find out
    total = sum(weight for _, weight in train)
    parts = [
        (f"{100 * weight / total:.4g}% from " if len(train) > 1 else "")
        + f"{row.num_tokens:,} tokens in {opened.place(path)}"
        for (row, weight), (path, _) in zip(train, mixture, strict=True)
    ]
    tokenizer = opened.tokenizer
    assert tokenizer is not None  # that of the first row
    return Sources(train, eval_sets, tokenizer, tokenizer.vocab_size, tokenizer.eod_id, ", ".join(parts))


def open_eval_sets(data: ConfigDict, progress: bool, paths: Sequence[str] = (), split: str = "") -> Sources:
    """Opens what a model is to be evaluated on, and nothing to train on.

    Args:
      data: the `data` group of a config.
      progress: whether to show the making of stores on stderr.
      paths: token stores, raw corpora or Megatron data; (): what training with `data` evaluates on.
      split: of each of the paths: eval, train or all; "": of a raw corpus all, of a store what it holds out.

    Raises:
      UserError: as `open_sources`.
    """
    opened = _Opened(data, progress)
    if paths:
        eval_sets = {}
        for name, path in opened.named(paths):
            eval_sets |= opened.parts(name, path, split)
    else:
        trained_on = [path for path, _ in data.mixture or ((data.path, 1.0),)]
        if not data.eval_sets:
            for path in trained_on:
                opened.row(path, "eval")
        named = data.eval_sets or opened.held_out(trained_on)
        eval_sets = {name: opened.row(path, "eval") for name, path in named}
    if not eval_sets:
        raise UserError("nothing is held out of Megatron data: name something to evaluate on (--data, data.eval_sets)")
    for row in eval_sets.values():
        Windows(row, data.sequence_length)
    tokenizer = opened.tokenizer
    assert tokenizer is not None  # that of the first row
    described = ", ".join(f"{row.num_tokens:,} tokens of {row.label}" for row in eval_sets.values())
    return Sources((), eval_sets, tokenizer, tokenizer.vocab_size, tokenizer.eod_id, described)


class _Opened:
    """What has been opened so far, by path: each once, all of one tokenizer."""

    def __init__(self, data: ConfigDict, progress: bool):
        self._data, self._progress = data, progress
        self._stores: dict[str, TokenStore | MegatronRow] = {}
        self._first: tuple[str, str] | None = None  # a path, and the fingerprint of its tokenizer
        self.tokenizer: Tokenizer | None = None

    def row(self, path: str, split: str) -> TokenRow:
        """Returns a split of the store at a path, or all of the Megatron data there."""
        if path not in self._stores:
            self._stores[path] = self._open(path)
        opened = self._stores[path]
        return opened if isinstance(opened, TokenRow) else opened.split(split)

    def _open(self, path: str) -> "TokenStore | MegatronRow":
        with reading(path):  # a name too long, a directory that may not be entered
            megatron = is_megatron(path)
        if megatron:
            tokenizer = given_tokenizer(self._data)
            self._check_tokenizer(path, tokenizer.fingerprint)
            self.tokenizer = self.tokenizer or tokenizer
            return MegatronRow(path, tokenizer.vocab_size)
        store = resolve_store(path, self._data, self._progress)
        self._check_tokenizer(path, store.fingerprint)
        self.tokenizer = self.tokenizer or store.tokenizer
        return store

    def _check_tokenizer(self, path: str, fingerprint: str) -> None:
        self._first = self._first or (path, fingerprint)
        if fingerprint != self._first[1]:
            raise UserError(
                f"{self._first[0]} and {path} have different tokenizers, so their ids mean different text: prepare one "
                "of them again with the tokenizer of the other"
            )

    def held_out(self, paths: list[str]) -> list[tuple[str, str]]:
        """Returns names for what the stores at these paths hold out, each with its path."""
        paths = [path for path in dict.fromkeys(paths) if not isinstance(self._stores[path], TokenRow)]
        return [(_HELD_OUT, paths[0])] if len(paths) == 1 else self.named(paths)

    def parts(self, name: str, path: str, split: str) -> dict[str, TokenRow]:
        """Returns the rows of what `open_eval_sets` has as `split`, by names that begin with `name`."""
        whole = self.row(path, "eval")
        store = self._stores[path]
        if isinstance(store, TokenRow):
            return {name: whole}
        if not split:
            is_raw = not is_remote(path) and store.path != Path(path).expanduser()
            split = "all" if is_raw else "eval"
        if split != "all":
            return {name: store.split(split)}
        needed = self._data.sequence_length + 1
        rows = {f"{name}-{each}": store.split(each) for each in SPLITS}
        # Of a small corpus one of the two may be less than a window; not both, or there is nothing to do.
        return {key: row for key, row in rows.items() if row.num_tokens >= needed} or {name: store.split("train")}

    def named(self, paths: Sequence[str]) -> list[tuple[str, str]]:
        """Returns a name for each path, made of its last part."""
        named: dict[str, str] = {}
        for path in dict.fromkeys(paths):
            name = unique = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).name).strip("-") or _HELD_OUT
            number = 1
            while unique in named:
                number += 1
                unique = f"{name}-{number}"
            named[unique] = path
        return list(named.items())

    def place(self, path: str) -> str | Path:
        """Returns where the tokens of a path lie: of a raw corpus, the store that was made of it."""
        opened = self._stores[path]
        return path if isinstance(opened, TokenRow) else opened.path
