"""Stands in for kubectl: takes what it takes for a JobSet, records each call, and answers as $WORLD says.

The world is the directory $WORLD: `calls.jsonl`, one line for each call; `failures/WHAT`, how often a verb (`get-KIND`
for `get`) is still to fail; `pods`, one line for each answer, the number of pods that run, of which the last one stays;
`states`, likewise, the JobSet's terminal state, `-` for none; `created.yaml`, what was created.
"""

import argparse
import json
import os
import sys
from pathlib import Path

WORLD = Path(os.environ["WORLD"])


def fails(what: str) -> bool:
    """Whether this is to fail now."""
    path = WORLD / "failures" / what
    left = int(path.read_text()) if path.exists() else 0
    if left:
        path.write_text(str(left - 1))
    return left > 0


def next_of(name: str) -> str:
    """The next answer of a list, the last of which stays."""
    path = WORLD / name
    now, *later = path.read_text().split()
    path.write_text("\n".join(later or [now]))
    return now


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The flags, as the reference of each command has them; others end it with status 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--namespace")
    verbs = parser.add_subparsers(dest="verb", required=True)
    flags = {
        "get": ["output", "selector", "field-selector"],
        "create": ["filename"],
        "delete": ["cascade"],
        "logs": ["selector", "container", "tail"],
    }
    for verb, names in flags.items():
        command = verbs.add_parser(verb, allow_abbrev=False)
        command.add_argument("positional", nargs="*")
        for name in names:
            command.add_argument(f"--{name}")
        command.add_argument("--follow", action="store_true")
    return parser.parse_args(arguments)


def main() -> int:
    with (WORLD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    given = parsed(sys.argv[1:])
    what = f"{given.verb}-{given.positional[0]}" if given.verb == "get" else given.verb
    if fails(what):
        print(f"Error from server: {what} was told to fail", file=sys.stderr)
        return 1
    if given.verb == "create":
        (WORLD / "created.yaml").write_text(sys.stdin.read())
    elif given.verb == "logs":
        print("step 7")
    elif what == "get-pods" and given.output == "name":
        print("".join(f"pod/pile-train-0-{number}\n" for number in range(int(next_of("pods")))), end="")
    elif what == "get-pods":
        print("NAME STATUS\npile-train-0-1-x Pending")
    elif what == "get-jobset" and given.output:
        print(next_of("states").strip("-"), end="")
    elif what == "get-jobset":
        print("NAME TERMINALSTATE\npile")
    return 0


if __name__ == "__main__":
    sys.exit(main())
