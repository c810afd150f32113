"""Stands in for gcloud: takes what it takes for queued resources, records each call, and runs what workers are to run.

The world is the directory $WORLD: `calls.jsonl`, one line for each call; `states`, one line for each answer about the
resource's state, of which the last one stays; `workers/N`, the home of each worker; `failures/WHAT`, how often that is
still to fail, where WHAT is a verb, or `ssh-N` for a worker that does not answer.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

WORLD = Path(os.environ["WORLD"])
NOT_FOUND = "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found"


def fails(what: str) -> bool:
    """Whether this is to fail now."""
    path = WORLD / "failures" / what
    left = int(path.read_text()) if path.exists() else 0
    if left:
        path.write_text(str(left - 1))
    return left > 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    """The flags, as the reference of each command has them; others end it with status 2."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    verbs = parser.add_subparsers(dest="verb", required=True)
    flags = {
        "create": ["accelerator-type", "runtime-version", "node-id", "node-count", "node-prefix", "service-account"],
        "describe": ["format"],
        "ssh": ["node", "worker", "command", "ssh-flag"],
        "scp": ["node", "worker"],
        "delete": [],
    }
    switches = {"create": ["spot", "reserved"], "ssh": ["tunnel-through-iap"], "scp": ["tunnel-through-iap"]}
    for verb, names in flags.items():
        command = verbs.add_parser(verb, allow_abbrev=False)
        command.add_argument("positional", nargs=2 if verb == "scp" else 1)
        command.add_argument("--zone", required=True)
        command.add_argument("--project")
        for name in names:
            command.add_argument(f"--{name}", action="append" if name == "ssh-flag" else "store")
        for name in [*switches.get(verb, []), "quiet", "force"]:
            command.add_argument(f"--{name}", action="store_true")
    return parser.parse_args(arguments)


def on_worker(home: Path, command: str) -> int:
    """Runs a command as the worker's login shell would."""
    if fails(f"ssh-{home.name}"):
        print(f"ssh: connect to worker {home.name}: Connection timed out", file=sys.stderr)
        return 255
    path = f"{WORLD / 'worker_bin'}:{os.environ['PATH']}"
    environment = os.environ | {"HOME": str(home), "PATH": path}
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment, check=False).returncode


def main() -> int:
    with (WORLD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(sys.argv[1:]) + "\n")
    assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"]
    given = parsed(sys.argv[4:])
    if fails(given.verb):
        print(f"ERROR: (gcloud.compute.tpus.queued-resources.{given.verb}) it was told to fail", file=sys.stderr)
        return 1
    states = WORLD / "states"
    if given.verb == "create":
        if states.exists():
            print("ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS", file=sys.stderr)
            return 1
        shutil.copy(WORLD / "states_after_create", states)
        for number in range(2):
            (WORLD / "workers" / str(number)).mkdir(parents=True)
        return 0
    if not states.exists():
        print(NOT_FOUND, file=sys.stderr)
        return 1
    if given.verb == "describe":
        now, *later = states.read_text().split()
        states.write_text("\n".join(later or [now]))
        print(now)
    elif given.verb == "delete":
        states.unlink()
        shutil.rmtree(WORLD / "workers")
    elif given.verb == "scp":
        source, target = given.positional
        for home in sorted((WORLD / "workers").iterdir()):
            shutil.copy(source, home / target.partition(":")[2])
    else:
        homes = sorted((WORLD / "workers").iterdir())
        if given.worker != "all":
            homes = [homes[int(given.worker)]]
        return max([on_worker(home, given.command) for home in homes])
    return 0


if __name__ == "__main__":
    sys.exit(main())
