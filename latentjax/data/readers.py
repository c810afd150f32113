"""Documents of a raw corpus: a text file, a JSON-lines file, or a directory of such files.

A new file format is one function in `READERS`, under the suffix it reads.
"""

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from latentjax.errors import UserError


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its text, where it stands ("file" or "file:line"), and the bytes it took up in the file there."""

    text: str
    source: str
    file_bytes: int


class NotText(UserError):
    """A text file that is not UTF-8. In a directory it is left out and counted; a file asked for by name fails."""


def read_text(path: Path, text_field: str) -> Iterator[Document]:
    """Yields the whole file, exactly as it is, as one document."""
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise NotText(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x} at {error.start})") from error
    yield Document(text, str(path), len(data))


def read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    """Yields one document per line: the string in field `text_field` of the JSON object there."""
    with path.open("rb") as file:
        yield from _documents_of_lines(file, path, text_field, file.tell)


def read_gzip_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    """Yields what `read_json_lines` does from a gzip-compressed file."""
    with path.open("rb") as compressed, gzip.open(compressed) as file:
        try:
            yield from _documents_of_lines(file, path, text_field, compressed.tell)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: damaged gzip file: {error}") from error


def _documents_of_lines(lines, path: Path, text_field: str, tell: Callable[[], int]) -> Iterator[Document]:
    position = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text (byte {error.start + 1} of the line)") from error
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not a JSON line: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise UserError(f"{where}: not a JSON line that can be read: {error}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: a line must hold a JSON object, not {type(record).__name__}")
        if text_field not in record:
            raise UserError(f"{where}: no field {text_field!r}; the line has {', '.join(map(repr, record)) or 'none'}")
        text = record[text_field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {text_field!r} is {type(text).__name__}, not a string")
        if not _is_unicode(text):
            raise UserError(f"{where}: field {text_field!r} holds half of a surrogate pair, which is no character")
        previous, position = position, tell()
        yield Document(text, where, position - previous)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


Reader = Callable[[Path, str], Iterator[Document]]

# By the end of the file's name; the first that matches. Any other file is text.
READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_gzip_json_lines,
}


def reader_for(path: Path) -> Reader:
    """Returns the function that reads files named like `path`."""
    return next((reader for suffix, reader in READERS.items() if path.name.lower().endswith(suffix)), read_text)


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of a corpus: its name below the corpus (or its own), size in bytes and time of change in ns."""

    name: str
    size: int
    changed: int


class Corpus:
    """A raw corpus on disk. `documents()` reads it in an order that depends only on the names of its files."""

    def __init__(self, path: str | Path, include: Sequence[str], exclude: Sequence[str], text_field: str):
        """Lists the files; reads none.

        Args:
          path: a file, or a directory of which the files are read that match a pattern of `include` and, with the
            directories above them, none of `exclude`.
          include, exclude: glob patterns against the path below the directory; `**` crosses directories.
          text_field: the field of a JSON line that holds the text.

        Raises:
          UserError: there is nothing at `path`, or no file matches.
        """
        self.path = Path(path).expanduser().absolute()
        self.is_directory = self.path.is_dir()
        self.skipped: list[str] = []  # names of the files that the latest `documents()` left out
        self._text_field = text_field
        if self.is_directory:
            names = _matching_files(self.path, include, exclude)
            if not names:
                raise UserError(
                    f"no file under {path} matches include {_listed(include)} without exclude {_listed(exclude)}"
                )
        elif self.path.exists():
            names = [self.path.name]
        else:
            raise UserError(f"no corpus at {path}: there is no such file or directory")
        root = self.path if self.is_directory else self.path.parent
        status = [(name, (root / name).stat()) for name in names]
        self.files = [CorpusFile(name, stat.st_size, stat.st_mtime_ns) for name, stat in status]

    @property
    def total_bytes(self) -> int:
        """Size of all files as they are on disk."""
        return sum(file.size for file in self.files)

    def documents(self) -> Iterator[Document]:
        """Yields every document, reading one file at a time.

        Raises:
          UserError: a file cannot be read, a JSON line is malformed or has no such text, text is not UTF-8 (of a
            directory, a text file that is not is left out and listed in `skipped`), or no document holds any text.
        """
        self.skipped = []
        has_text = False
        for file in self.files:
            path = self.path / file.name if self.is_directory else self.path
            try:
                for document in reader_for(path)(path, self._text_field):
                    has_text = has_text or bool(document.text)
                    yield document
            except NotText:
                if not self.is_directory:
                    raise
                self.skipped.append(file.name)
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        if not has_text:
            raise UserError(
                f"the corpus {self.path} is empty: {len(self.files)} files, no text in them"
                + (f" ({len(self.skipped)} skipped: not UTF-8)" if self.skipped else "")
            )


def _matching_files(root: Path, include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    wanted, unwanted = _compile(include), _compile(exclude)
    found = []
    for directory, subdirectories, files in os.walk(root, onerror=_refuse):
        below = Path(directory).relative_to(root)
        # A directory that is left out is not walked: it may be large.
        subdirectories[:] = [name for name in subdirectories if not unwanted.fullmatch((below / name).as_posix())]
        names = [(below / name).as_posix() for name in files]
        found += [name for name in names if wanted.fullmatch(name) and not unwanted.fullmatch(name)]
    return sorted(name for name in found if (root / name).is_file())


def _refuse(error: OSError) -> None:
    # os.walk would otherwise pass over a directory that it may not read.
    raise UserError(f"cannot read the directory {error.filename}: {error.strerror}")


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
