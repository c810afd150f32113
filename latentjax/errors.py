"""The one exception that is a user's mistake, and how a verb reports it.

Everything a user can get wrong (a key, a type, a path, a mesh) is raised as `UserError` with one line that says
what, where and what to do. `run_verb` prints that line and leaves with status 2 (or that of the kind of mistake); any
other exception is a bug in latentjax and keeps its traceback.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what to do."""

    exit_status = 2

    def __init__(self, message: str):
        """Takes the message; what other libraries have said in it may have line breaks, which become spaces."""
        super().__init__(" ".join(filter(None, map(str.strip, message.splitlines()))))


class OthersMissing(UserError):
    """The other processes of a run cannot be reached: mistyped, or not there yet, so that a later start may work."""

    exit_status = 75  # EX_TEMPFAIL


def brief(text: object, limit: int = 160) -> str:
    """Returns a text, such as what another library says, as one line of at most `limit` characters.

    What is too long loses its middle: the beginning says what is wrong, the end often where.
    """
    line = " ".join(str(text).split())
    if len(line) <= limit:
        return line
    kept = limit - len(" ... ")
    return f"{line[: kept - kept // 3]} ... {line[len(line) - kept // 3 :]}"


def shown(value: Any, limit: int = 80) -> str:
    """Returns a value that the user gave, as Python writes it and as `brief` shortens it."""
    try:
        return brief(repr(value), limit)
    except ValueError:  # Python writes no whole number of more than some thousands of digits
        return f"a {type(value).__name__} too long to be shown"


def run_verb(name: str, main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main(argv)` and exits with its status; a `UserError` becomes one line on stderr and its status."""
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except (UserError, KeyboardInterrupt) as error:
        status = report(name, error)
    except BrokenPipeError:
        # The reader of our output went away (`... | head`): nothing is wrong, and nobody is there to be told.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def report(name: str, error: BaseException) -> int:
    """Says on stderr what ended the verb `name`, a user's mistake in one line; returns the exit status for it."""
    if isinstance(error, UserError):
        print(f"latentjax.{name}: error: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    if isinstance(error, KeyboardInterrupt):
        # A verb that has something to save handles the signal itself and never comes here.
        print(f"latentjax.{name}: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    traceback.print_exception(error)
    return 1
