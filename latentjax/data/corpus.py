"""A raw corpus: which files it has, in which order, and the documents in them."""

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentjax.data import remote
from latentjax.data.readers.base import CorpusFile, LeftOut, Malformed, Piece, Reader, ReaderOptions, Span
from latentjax.data.readers.formats import TFDS, reader_for
from latentjax.errors import UserError

_WILDCARDS = re.compile(r"[*?\[]")
# What `datasets.save_to_disk` leaves beside the data of one split, and of several.
_STATE, _SPLITS = "state.json", "dataset_dict.json"


class Corpus:
    """The files of a raw corpus, in an order that depends on their names only.

    Instances can be sent to other processes; they hold the list of files and nothing that is open.

    Attributes:
      path: where it is: an absolute local path, a URL or `tfds:NAME/SPLIT`.
      files: in order; `Span.file` counts them.
      options: how they are read.
    """

    def __init__(self, path: str | Path, include: Sequence[str], exclude: Sequence[str], options: ReaderOptions):
        """Lists the files; reads none.

        Args:
          path: one of, on this machine or behind a URL that fsspec knows:
            a file;
            a directory, of which the files are read that match a pattern of `include` and, with the directories above
            them, none of `exclude`;
            a path with wildcards (`corpus/**/*.py`), which stand in for `include`;
            a directory that the library datasets has saved (`save_to_disk`);
            or `tfds:NAME/SPLIT`, a data set of TensorFlow Datasets (`tfds:wikipedia/20230601.en:1.0.0/train[:10%]`).
          include, exclude: glob patterns against the path below the directory; `**` crosses directories.

        Raises:
          UserError: there is nothing at `path`, no file matches, a directory cannot be listed, a pattern is none, or a
            package is missing.
        """
        path = str(path)
        self.options = options
        if path.startswith(TFDS):
            from latentjax.data.readers.tfds import corpus_file

            self.path, self.files = path, [corpus_file(path)]
            return
        self.path = path if remote.is_remote(path) else os.path.abspath(os.path.expanduser(path))
        found = remote.entry(self.path)
        if found is not None and not found.is_directory:
            self.files = [CorpusFile(self.path.rsplit("/", 1)[-1], self.path, found.size, found.stamp, named=True)]
        elif found is None:
            self.files = _files_of_pattern(path, exclude)
        elif (names := _saved_files(self.path)) is not None:
            places = [(name, remote.join(self.path, name)) for name in names]
            self.files = [CorpusFile(name, place, *remote.size_and_stamp(place), True) for name, place in places]
        else:
            self.files = _files_below(self.path, include, exclude)
            if not self.files:
                raise UserError(
                    f"no file under {path} matches include {_listed(include)} without exclude {_listed(exclude)}"
                )

    @property
    def total_bytes(self) -> int:
        """Size of all files as they are stored."""
        return sum(file.size for file in self.files)

    def reader(self, number: int) -> Reader:
        """Returns what reads file `number`.

        Raises:
          UserError: a package that it needs is missing.
        """
        return reader_for(self.files[number], self.options)

    def plan(self, number: int, span_bytes: int) -> list[Span]:
        """Returns the spans of file `number`; see `Reader.plan`. Of a large compressed file that takes long."""
        return self.reader(number).plan(number, self.files[number], span_bytes)

    def spans(self, span_bytes: int) -> list[Span]:
        """Returns the spans of all files, in order.

        Raises:
          UserError: a file cannot be read, is damaged, or has no field of the name wanted.
        """
        return [span for number in range(len(self.files)) for span in self.plan(number, span_bytes)]

    def read(self, span: Span) -> Iterator[Piece | Malformed | LeftOut]:
        """Yields the documents of a span in order; see `Reader.read`."""
        return self.reader(span.file).read(self.files[span.file], span)


def _files_below(
    root: str, include: Sequence[str], exclude: Sequence[str], max_depth: int | None = None
) -> list[CorpusFile]:
    wanted, unwanted = _compile(include), _compile(exclude)
    found = remote.walk(
        root,
        # A directory that is left out is not walked: it may be large.
        enter=lambda name: not unwanted.fullmatch(name),
        wanted=lambda name: bool(wanted.fullmatch(name)) and not unwanted.fullmatch(name),
        max_depth=max_depth,
    )
    files = [
        CorpusFile(name, remote.join(root, name), entry.size, entry.stamp, named=False)
        for name, entry in found
        if entry is not None  # deleted in the meantime
    ]
    return sorted(files, key=lambda file: file.name)


def _files_of_pattern(path: str, exclude: Sequence[str]) -> list[CorpusFile]:
    """Returns the files that a path with wildcards stands for."""
    wildcard = _WILDCARDS.search(path)
    if wildcard is None:
        raise UserError(f"no corpus at {path}: there is no such file or directory")
    split = path.rfind("/", 0, wildcard.start()) + 1
    root, pattern = path[:split], path[split:]
    if not remote.is_remote(root):
        root = os.path.abspath(os.path.expanduser(root))
    files = []
    if remote.is_directory(root):
        # Without `**`, a pattern says how deep it goes.
        files = _files_below(root, [pattern], exclude, None if "**" in pattern else pattern.count("/"))
    if not files:
        without = f" without exclude {_listed(exclude)}" if exclude else ""
        raise UserError(f"no file matches {path}{without}: there is none below {root}")
    return files


def _saved_files(root: str) -> list[str] | None:
    """Returns the names of the files of a saved data set in their order; None if the directory is another."""
    if remote.entry(splits := remote.join(root, _SPLITS)):
        names = _read_json(splits).get("splits") or ["(none)"]
        raise UserError(
            f"{root} is a data set with the splits {', '.join(map(str, names))}: give one of them, such as "
            f"{remote.join(root, str(names[0]))}"
        )
    if not remote.entry(path := remote.join(root, _STATE)):
        return None
    state = _read_json(path)
    if not isinstance(state.get("_data_files"), list):
        return None  # a file of that name by chance
    if state.get("_indices_data_files"):
        raise UserError(f"{root} was saved by an old version of datasets, with indices: load and save it anew")
    names = [str(file.get("filename")) for file in state["_data_files"]]
    if not names:
        raise UserError(f"the data set {root} is empty: it has no files")
    return names


def _read_json(path: str) -> dict:
    with remote.open_binary(path) as file:
        try:
            found = json.loads(file.read(1 << 26))
        except (ValueError, RecursionError):
            found = {}
    return found if isinstance(found, dict) else {}


def _compile(patterns: Sequence[str]) -> re.Pattern:
    """Makes one regular expression of glob patterns over paths with `/`; none at all match nothing."""
    try:
        return re.compile("|".join(map(_translate, patterns)) or r"(?!)", re.DOTALL)
    except re.error as error:
        raise UserError(f"not a glob pattern among {_listed(patterns)}: {error}") from error


def _translate(pattern: str) -> str:
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\])", pattern)
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    # Odd places hold the wildcards, even ones the text between them.
    for place, token in enumerate(tokens):
        if place % 2 == 0:
            tokens[place] = re.escape(token)
        elif token in wildcards:
            tokens[place] = wildcards[token]
        else:
            negation = "^" if token[1] == "!" else ""
            characters = re.sub(r"([\\^\[\]])", r"\\\1", token[1 + len(negation) : -1])
            tokens[place] = f"[{negation}{characters}]"
    return "".join(tokens)


def _listed(patterns: Sequence[str]) -> str:
    return ", ".join(patterns) or "(none)"
