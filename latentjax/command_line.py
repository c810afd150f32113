"""Reading flags the same way in every verb."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from latentjax.errors import UserError, brief


class _StoreOnce(argparse.Action):
    """Stores the value of a flag, as argparse does, but not silently the last of several."""

    _filled: argparse.Namespace | None = None

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if self._filled is namespace:
            raise UserError(f"{'/'.join(self.option_strings) or self.dest} is given twice: give it once")
        self._filled = namespace
        setattr(namespace, self.dest, values)


class LineParser(argparse.ArgumentParser):
    """Reports a usage mistake as everything else a user can get wrong: in one line, with status 2.

    A flag with a value may be given once. (`--config.KEY=VALUE` is none of its flags: there the last one wins, so that
    a script can put its own behind those of its user.)
    """

    def __init__(self, *arguments: Any, **settings: Any):
        super().__init__(*arguments, **settings)
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{brief(message, 300)} (--help lists the flags)")


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `training.processes.start` takes, of a program that several processes run together."""
    group = parser.add_argument_group("several processes (those of Slurm, Open MPI and TPU pods need none of this)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where several are started by hand")
    group.add_argument("--num_processes", type=int, help="with --coordinator: how many there are")
    group.add_argument("--process_id", type=int, help="with --coordinator: which of them this is, from 0")


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
                raise UserError(f"{brief(argument)} has no value: write {brief(argument)}=VALUE")
            override = f"{override}={value}"
        overrides.append(override)
    return others, overrides
