"""Where a store is written: a local directory or a URL, in which every file appears whole or not at all."""

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentjax.data.remote import filesystem_of, is_remote
from latentjax.errors import UserError


class OutputDirectory:
    """A directory of files that are written once. Small, and can be sent to other processes."""

    def __init__(self, path: str):
        """Takes the path; makes nothing."""
        self.is_remote = is_remote(path)
        self.path = path.rstrip("/") if self.is_remote else str(Path(path).expanduser().absolute())

    def create(self) -> None:
        """Makes the directory if it is not there, and clears away what killed processes of this host left in it.

        Raises:
          UserError: it cannot be made or written.
        """
        if self.is_remote:
            return
        with self._reported():
            directory = Path(self.path)
            directory.mkdir(parents=True, exist_ok=True)
            for path in directory.glob(f".*.{_host()}-*.tmp"):
                if not _is_running(int(path.name.split("-")[-1].removesuffix(".tmp"))):
                    _remove(path)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    def names(self) -> list[str]:
        """Returns the names of the files (and directories) in it, none if it is not there."""
        with self._reported():
            if self.is_remote:
                filesystem, root = filesystem_of(self.path)
                if not filesystem.exists(root):
                    return []
                return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in filesystem.ls(root, detail=False))
            return sorted(path.name for path in Path(self.path).iterdir()) if Path(self.path).is_dir() else []

    def read_json(self, name: str) -> Any | None:
        """Returns the content of a JSON file, or None if it is not there.

        Raises:
          UserError: it cannot be read or is damaged.
        """
        with self._reported():
            try:
                if self.is_remote:
                    filesystem, root = filesystem_of(self.path)
                    text = filesystem.cat_file(f"{root}/{name}").decode()
                else:
                    text = Path(self.path, name).read_text()
            except FileNotFoundError:
                return None
            except UnicodeDecodeError as error:
                raise UserError(f"{self.path}/{name} is damaged: {error}") from error
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}/{name} is damaged: {error}") from error

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file."""
        with self.staged(name) as path:
            path.write_text(json.dumps(value, indent=2) + "\n")

    @contextlib.contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Gives a local path to write a file (or directory) to, and puts it in place at the end if nothing was raised.

        Raises:
          UserError: the disk is full, or it cannot be written.
        """
        with self._reported():
            if self.is_remote:
                with tempfile.TemporaryDirectory(prefix="latentjax-") as directory:
                    staging = Path(directory, name.replace("/", "-"))
                    yield staging
                    filesystem, root = filesystem_of(self.path)
                    filesystem.put(str(staging), f"{root}/{name}", recursive=staging.is_dir())
                return
            target = Path(self.path, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            staging = Path(self.path, f".{name.replace('/', '-')}.{_host()}-{os.getpid()}.tmp")
            try:
                yield staging
                _flush_to_disk(staging)
                if staging.is_dir() and target.is_dir():
                    return  # another process was first; directories cannot be replaced, and the content is the same
                os.replace(staging, target)
            finally:
                _remove(staging)

    def remove(self, name: str) -> None:
        """Removes a file or directory, if it is there."""
        with self._reported():
            if self.is_remote:
                filesystem, root = filesystem_of(self.path)
                if filesystem.exists(f"{root}/{name}"):
                    filesystem.rm(f"{root}/{name}", recursive=True)
            else:
                _remove(Path(self.path, name))

    def remove_if_empty(self) -> None:
        """Removes a local directory that holds nothing."""
        if not self.is_remote:
            with contextlib.suppress(OSError):
                Path(self.path).rmdir()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"cannot write {self.path}: the disk is full; free some space, then give the command again: it "
                    "continues"
                ) from error
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error


def _host() -> str:
    return socket.gethostname().replace(".", "-")


def _flush_to_disk(path: Path) -> None:
    # A file that is in place must be whole after a power cut too.
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb") as file:
                os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if process == os.getpid():
        return False  # ours now, and it has not begun yet
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
