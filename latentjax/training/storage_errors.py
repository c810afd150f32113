"""What an error of the storage means: damage, a full disk, or trouble that may pass; and saying so in one line."""

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latentjax.errors import UserError, brief

_FULL = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")
# Numbers of errors that say that a file is not as it was written. Any other (no permission, a failing disk, a network
# that is down, too many open files) speaks of the way to the file.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
# The same for errors that have words only: TensorStore's, and those of stores behind URLs.
_TROUBLE = re.compile(
    r"PERMISSION_DENIED|UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|"
    r"Permission denied|Input/output error|Stale file handle|Connection|[Tt]imed out|[Tt]imeout|Too many open files|"
    r"Cannot allocate memory|Forbidden|Unauthorized|credential|Network is|Too Many Requests"
)
# What TensorStore and Orbax say of their own insides.
_NOISE = re.compile(r"\s*\[(tensorstore_spec|source locations).*|\. See full TensorStore details.*", re.DOTALL)
_LONGEST = 300


def is_full(error: BaseException) -> bool:
    """Returns whether the disk, or the user's share of it, is full."""
    return any(
        getattr(each, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(_text(each))
        for each in _chain(error)
    )


def is_damage(error: BaseException) -> bool:
    """Returns whether an error in reading says that the data are not what was written.

    Without that, and where it may be trouble that passes, the data have to be left as they are.
    """
    for each in _chain(error):
        number = each.errno if isinstance(each, OSError) else None
        if number is not None and number not in _DAMAGE:
            return False
        if isinstance(each, MemoryError) or (number is None and _TROUBLE.search(_text(each))):
            return False
    return not is_full(error)


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line of bearable length."""
    if is_full(error):
        return "no space left on device"
    root = _chain(error)[-1]
    text = root.strerror if isinstance(root, OSError) and root.strerror else _text(root)
    if isinstance(root, OSError) and root.strerror and root.filename:
        text = f"{text}: {root.filename}"
    if not isinstance(root, OSError | ValueError) or not text:
        text = f"{type(root).__name__}: {text}".rstrip(": ")
    return brief(text, _LONGEST)


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    chain = [error]
    while chain[-1].__cause__ is not None and chain[-1].__cause__ not in chain:
        chain.append(chain[-1].__cause__)
    return chain


def _text(error: BaseException) -> str:
    return " ".join(_NOISE.sub("", str(error)).split())


def ignore_leftovers() -> None:
    """Keeps quiet what TensorStore's and Orbax's reads and writes still have to say when another of them has failed.

    One failure ends them all, and the others then find their event loop closed. Python would print a traceback for each
    of them; the failure itself is raised, and told in one line.
    """
    previous = sys.unraisablehook
    if getattr(previous, "ignores_leftovers", False):
        return

    def hook(unraisable: Any) -> None:
        text = str(unraisable.exc_value)
        if text != "Event loop is closed" and not text.startswith("Encountered error while reading array index"):
            previous(unraisable)

    hook.ignores_leftovers = True
    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(lambda record: "was never retrieved" not in record.getMessage())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes a `UserError` of an error of the disk in writing `path`, one of the files that a run leaves behind."""
    try:
        yield
    except OSError as error:
        advice = "free some and give" if is_full(error) else "mend that and give"
        raise UserError(
            f"cannot write {path} ({one_line(error)}): {advice} the same command again, which continues from the last "
            "checkpoint"
        ) from error
