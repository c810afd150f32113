"""The one exception that is a user's mistake, and how a verb reports it.

Everything a user can get wrong (a key, a type, a path, a mesh) is raised as `UserError` with one line that says
what, where and what to do. `run_verb` prints that line and leaves with status 2; any other exception is a bug in
latentjax and keeps its traceback.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what to do."""


def run_verb(name: str, main: Callable[[Sequence[str]], int]) -> None:
    """Runs `main(argv)` and exits with its status; a `UserError` becomes one line on stderr and status 2."""
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
        print(f"latentjax.{name}: error: {one_line(error)}", file=sys.stderr, flush=True)
        return 2
    if isinstance(error, KeyboardInterrupt):
        # A verb that has something to save handles the signal itself and never comes here.
        print(f"latentjax.{name}: interrupted", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    traceback.print_exception(error)
    return 1


def one_line(error: BaseException) -> str:
    """The message of an exception, without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
