"""What an error of the storage means: damage, a full disk, or trouble that may pass; and saying so in one line."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from latentjax.errors import UserError

_FULL = re.compile(r"No space left on device|Disk quota exceeded|ENOSPC|EDQUOT")
# What says that a file is not as it was written, where an error has a number. Any other number (no permission, a failing
# disk, a network that is down, too many open files) speaks of the way to the file.
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)
# The same for errors that have words only: TensorStore's, and those of stores behind URLs.
_TROUBLE = re.compile(
    r"PERMISSION_DENIED|UNAVAILABLE|UNAUTHENTICATED|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED|CANCELLED|"
    r"Permission denied|Input/output error|Stale file handle|Connection|[Tt]imed out|[Tt]imeout|Too many open files|"
    r"Cannot allocate memory|Forbidden|Unauthorized|credential|Network is|Too Many Requests"
)
_NOISE = re.compile(r"\s*\[(tensorstore_spec|source locations)=.*|\s*; to fix this.*", re.DOTALL)
_LONGEST = 300


def is_full(error: BaseException) -> bool:
    """Returns whether the disk, or the user's share of it, is full."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(_FULL.search(str(error)))


def is_damage(error: BaseException) -> bool:
    """Returns whether an error in reading says that the data are not what was written.

    Without that, and where it may be trouble that passes, the data have to be left as they are.
    """
    if isinstance(error, MemoryError):
        return False
    number = getattr(error, "errno", None) if isinstance(error, OSError) else None
    if number is not None:
        return number in _DAMAGE
    return not _TROUBLE.search(str(error)) and not is_full(error)


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line of bearable length."""
    if is_full(error):
        return "no space left on device"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    text = " ".join(_NOISE.sub("", text).split())
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{text}: {error.filename}"
    if not isinstance(error, OSError | ValueError) or not text:
        text = f"{type(error).__name__}: {text}".rstrip(": ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


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
