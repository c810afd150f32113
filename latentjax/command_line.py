"""Reading flags the same way in every verb."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from latentjax.errors import UserError


class LineParser(argparse.ArgumentParser):
    """Reports a usage mistake as everything else a user can get wrong: in one line, with status 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes `--config.KEY=VALUE` (or `--config.KEY VALUE`) out of a command line.

    Returns:
      The other arguments, and the overrides as `KEY=VALUE`.

    Raises:
      UserError: the last override has no value.
    """
    others, overrides = [], []
    remaining = iter(argv)
    for argument in remaining:
        if not argument.startswith("--config."):
            others.append(argument)
            continue
        override = argument.removeprefix("--config.")
        if "=" not in override:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            override = f"{override}={value}"
        overrides.append(override)
    return others, overrides
