"""Opening and listing files, on this machine or behind any URL that fsspec knows (`gs://`, `s3://`, `hf://`, ...).

Whatever goes wrong on the way to the bytes (no such file, no permission, no network, a failing disk) is a `UserError`
with the path. Local paths are opened without fsspec.
"""

import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from latentjax.errors import UserError

BUFFER_BYTES = 1 << 20

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|[A-Za-z][A-Za-z0-9+.-]*::")
# What fsspec needs for a scheme; it names the package of any other itself.
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "s3a": "s3fs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
}
# Of what a store says about a file, the first there changes when the file does.
_STAMPS = ("generation", "etag", "ETag", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True, slots=True)
class Entry:
    """What stands at a path: a directory or a file, its size in bytes (0 if unknown) and what changes when it does."""

    is_directory: bool
    size: int
    stamp: str


def is_remote(path: str) -> bool:
    """Returns whether `path` is a URL."""
    return _URL.match(path) is not None


def entry(path: str) -> Entry | None:
    """Returns what stands at `path`, or None where there is nothing.

    Raises:
      UserError: that cannot be found out, or a package is missing.
    """
    if not is_remote(path):
        with reading(path):
            try:
                status = os.stat(path)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return Entry(os.path.isdir(path), status.st_size, str(status.st_mtime_ns))
    with reading(path):
        filesystem, inner = filesystem_of(path)
        try:
            return _entry(filesystem.info(inner))
        except FileNotFoundError:
            return None


def is_directory(path: str) -> bool:
    """Returns whether there is a directory at `path`; raises as `entry`."""
    found = entry(path)
    return found is not None and found.is_directory


def size_and_stamp(path: str) -> tuple[int, str]:
    """Returns the size of a file in bytes (0 if unknown) and what changes when the file does.

    Raises:
      UserError: there is no such file, or that cannot be found out.
    """
    found = entry(path)
    if found is None:
        raise UserError(f"cannot read {path}: no such file")
    return found.size, found.stamp


def open_binary(path: str) -> "io.BufferedReader[_LocalFile | _RemoteFile]":
    """Opens a file for reading, buffered; its `raw.consumed` counts the bytes read from the disk or network.

    Raises:
      UserError: the file cannot be opened; its `read` and the like: cannot be read.
    """
    with reading(path):
        raw = _RemoteFile(path) if is_remote(path) else _LocalFile(path)
    return io.BufferedReader(raw, BUFFER_BYTES)


def walk(
    root: str, enter: Callable[[str], bool], wanted: Callable[[str], bool], max_depth: int | None = None
) -> Iterator[tuple[str, Entry | None]]:
    """Yields the files below a directory, in no particular order, as their names below it (with `/`) and entries.

    The entry of a file that was deleted in the meantime is None.

    Args:
      enter: of the name of a directory, whether to look into it.
      wanted: of the name of a file, whether to yield it.
      max_depth: of directories below the root to look into; None: any.

    Raises:
      UserError: a directory cannot be listed.
    """
    list_directory = _list_remote if is_remote(root) else _list_local
    waiting = [("", 0)]
    while waiting:
        below, depth = waiting.pop()
        for name, found in list_directory(root, below):
            if found is None:
                if (max_depth is None or depth < max_depth) and enter(name):
                    waiting.append((name, depth + 1))
            elif wanted(name):
                yield name, found()


def join(root: str, name: str) -> str:
    """Returns the path of what is called `name` below the directory `root`."""
    return f"{root.rstrip('/')}/{name}" if is_remote(root) else os.path.join(root, name)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Makes a `UserError` with the path of an error of the disk or, behind a URL, of whatever the far side raises."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error or type(error).__name__}") from error
    except Exception as error:
        # Every store has exceptions of its own: credentials, quota, HTTP status.
        if not is_remote(path):
            raise
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}") from error


class _LocalFile(io.FileIO):
    """A local file that counts what was read and names itself in errors."""

    def __init__(self, path: str):
        super().__init__(path, "rb")
        self.consumed = 0

    def readinto(self, buffer) -> int:
        with reading(self.name):
            count = super().readinto(buffer)
        self.consumed += count
        return count


class _RemoteFile(io.RawIOBase):
    """The same for a file that fsspec opens."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        filesystem, inner = filesystem_of(path)
        self._file = filesystem.open(inner, "rb")
        self.consumed = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file.seekable()

    def readinto(self, buffer) -> int:
        with reading(self._path):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        self.consumed += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with reading(self._path):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _list_local(root: str, below: str) -> Iterator[tuple[str, Callable[[], Entry | None] | None]]:
    """Yields what is in a directory: names, and None for directories, else what finds out the rest."""
    directory = os.path.join(root, below)
    try:
        with os.scandir(directory) as found:
            items = list(found)
    except OSError as error:
        raise UserError(f"cannot read the directory {directory}: {error.strerror}") from error
    for item in items:
        name = f"{below}/{item.name}" if below else item.name
        if item.is_dir(follow_symlinks=False):
            yield name, None
        elif os.path.isfile(item.path):  # also behind a link; links to directories may go in circles
            yield name, lambda path=item.path: entry(path)


def _list_remote(root: str, below: str) -> Iterator[tuple[str, Callable[[], Entry] | None]]:
    path = join(root, below) if below else root
    with reading(path):
        filesystem, inner = filesystem_of(path)
        items = filesystem.ls(inner, detail=True)
    for item in items:
        last = item["name"].rstrip("/").rsplit("/", 1)[-1]
        kind = item["type"]
        # Some stores list a directory, or an empty object that stands for it, among what is in it.
        if item["name"].rstrip("/") == inner.rstrip("/") or (kind != "directory" and item["name"].endswith("/")):
            continue
        name = f"{below}/{last}" if below else last
        yield name, None if kind == "directory" else lambda item=item: _entry(item)


def _entry(info: dict) -> Entry:
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
    return Entry(info["type"] == "directory", int(info.get("size") or 0), stamp)


def filesystem_of(path: str):
    """Returns fsspec's file system for a URL, and the path in it."""
    scheme = re.split(r"::|://", path, maxsplit=1)[0]
    try:
        import fsspec  # slow to import, and not needed for local paths
    except ImportError as error:
        raise UserError(f"reading {scheme}:// paths needs the package fsspec: pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(path)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        advice = f"the package {package}: pip install {package}" if package else f"a package: {error}"
        raise UserError(f"reading {scheme}:// paths needs {advice}") from error
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}") from error
