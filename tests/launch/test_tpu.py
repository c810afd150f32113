"""launch/tpu.sh against a stand-in of gcloud: its commands, what workers do with them, what happens when they fail."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scripts import ROOT, executable, run_script, script

STAND_IN = Path(__file__).parent / "gcloud_stand_in.py"
# What a worker has, in place of the real things: pip, uv, and a Python whose trainer runs until it is told how to end.
PYTHON3 = """
case "$*" in
  *pip*) exec test ! -e "$HOME/no_network" ;;
  *user-base*) mkdir -p "$HOME/.local/bin"; cp "$WORLD/uv" "$HOME/.local/bin/uv"; echo "$HOME/.local" ;;
esac
"""
UV = """
[ "$1" = venv ] || exit 0
mkdir -p .venv/bin
cp "$WORLD/trainer" .venv/bin/python
cp "$CHECKOUT/launch/tpu_worker.sh" launch/ # also while it is not committed
"""
TRAINER = """
printf '%s\\0' "$@" >>"$HOME/starts"
echo "step 7"
trap 'exit 143' TERM
while [ -d "$HOME" ] && [ ! -e "$HOME/end" ]; do sleep 0.02; done
status=$(cat "$HOME/end") && rm "$HOME/end" && exit "$status"
"""
FLAGS = ["--config", "configs/a b.py", '--config.train.sample_prompts=it\'s "$HOME"; exit 3', "--workdir", "/mnt/run"]


class World:
    """Google Cloud as far as the script can see."""

    def __init__(self, path: Path):
        self.path = path
        self.watching: subprocess.Popen | None = None
        for name in ("bin", "worker_bin", "failures"):
            (path / name).mkdir()
        executable(path / "bin" / "gcloud", f'exec {sys.executable} -S -E {STAND_IN} "$@"')
        executable(path / "worker_bin" / "python3", PYTHON3)
        executable(path / "worker_bin" / "hostname", 'basename "$HOME"')
        executable(path / "uv", UV)
        executable(path / "trainer", TRAINER)
        self.after_create("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
        self.environment = os.environ | {
            "WORLD": str(path),
            "CHECKOUT": str(ROOT),
            "PATH": f"{path / 'bin'}:{os.environ['PATH']}",
            "TMPDIR": str(path),
        }

    def after_create(self, *states: str) -> None:
        """What will be answered, one after the other, about a resource that has been created."""
        (self.path / "states_after_create").write_text("\n".join(states))

    def set_state(self, state: str) -> None:
        """What is answered from now on."""
        (self.path / "states").write_text(state)

    def fail(self, what: str, times: int) -> None:
        """The next calls of a kind fail."""
        (self.path / "failures" / what).write_text(str(times))

    def arguments(self, verb: str, *further: str) -> list[str]:
        """A command line with everything but the trainer's flags."""
        flags = ["--name", "pile", "--zone", "us-east5-a", "--poll", "0.2", "--attempts", "3", *further]
        return [verb, *flags, *(["--accelerator_type", "v5p-16"] if verb in ("run", "create") else [])]

    def call(self, verb: str, *further: str, flags: list[str] = FLAGS) -> subprocess.CompletedProcess:
        """Runs the script to its end."""
        flags = ["--", *flags] if verb in ("run", "start") else []
        return run_script("tpu.sh", *self.arguments(verb, *further), *flags, environment=self.environment)

    def watch(self, *further: str) -> subprocess.Popen:
        """Starts `run`, and leaves it running."""
        self.watching = subprocess.Popen(
            [script("tpu.sh"), *self.arguments("run", *further), "--", *FLAGS],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.watching

    def close(self) -> None:
        """Ends what a test that failed has left running."""
        if self.watching is not None and self.watching.poll() is None:
            self.watching.kill()
            self.watching.wait()
        for pid in self.path.glob("workers/*/latentjax/run.pid"):
            subprocess.run(["kill", pid.read_text().strip()], check=False, stderr=subprocess.DEVNULL)

    def calls(self) -> list[list[str]]:
        """Every command so far, without what all have in common."""
        path = self.path / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)[3:] for line in lines]

    def verbs(self) -> list[str]:
        """The commands so far; of those over ssh, what they were for. Looks at states and workers are left out."""
        verbs = []
        for verb, *rest in self.calls():
            command = next((each for each in rest if each.startswith("--command=")), "")
            if verb == "ssh":
                verb = "install" if "uv" in command else command.rpartition("tpu_worker.sh ")[2].split(" ")[0]
            verbs += [verb] if verb not in ("describe", "status") else []
        return verbs

    def starts(self, worker: int) -> list[list[str]]:
        """What each start of the trainer on a worker was given."""
        path = self.path / "workers" / str(worker) / "starts"
        words = path.read_text().split("\0")[:-1] if path.exists() else []
        length = 2 + len(FLAGS)
        return [words[at : at + length] for at in range(0, len(words), length)]

    def end(self, status: int, workers: tuple[int, ...] = (0, 1)) -> None:
        """The trainers end with a status."""
        for worker in workers:
            (self.path / "workers" / str(worker) / "end").write_text(str(status))

    def both_start(self, times: int = 1) -> bool:
        return all(len(self.starts(worker)) == times for worker in (0, 1))


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def wait_until(condition: Callable[[], bool], watched: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline or (watched is not None and watched.poll() is not None):
            raise AssertionError(f"did not come true: {watched.communicate() if watched else ''}")
        time.sleep(0.02)


def finished(watched: subprocess.Popen) -> tuple[int, str]:
    _, err = watched.communicate(timeout=60)
    return watched.returncode, err


def test_a_run_from_nothing_to_its_end(world: World):
    watched = world.watch("--project", "mine", "--create_flag=--spot", "--setup", "echo \"set 'up'\"")
    wait_until(world.both_start, watched)
    world.end(0, (0,))
    looks = len(world.calls())
    wait_until(lambda: len(world.calls()) > looks + 4, watched)  # it sees that the other is still at work
    world.end(0, (1,))
    assert finished(watched) == (0, "tpu.sh: done; launch/tpu.sh delete gives the TPUs back\n")
    assert world.verbs() == ["create", "scp", "install", "start"]
    create, *later = [call for call in world.calls() if call[0] != "describe"]
    assert create == [
        "create", "pile", "--node-id=pile", "--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5",
        "--spot", "--quiet", "--zone=us-east5-a", "--project=mine",
    ]  # fmt: skip
    for call in later:
        assert {"--node=all", "--worker=all", "--zone=us-east5-a", "--project=mine"} <= set(call), call
    # What the user wrote comes to the trainer as it is, on every worker, after the setup.
    for worker in (0, 1):
        assert world.starts(worker) == [["-m", "latentjax.train", *FLAGS]]
        assert (world.path / "workers" / str(worker) / "latentjax" / "run.log").read_text() == "set 'up'\nstep 7\n"


def test_several_slices_and_another_image(world: World):
    result = world.call("create", "--num_slices", "2", "--runtime_version", "mine")
    assert (result.returncode, result.stderr) == (
        0,
        "tpu.sh: waiting for pile: WAITING_FOR_RESOURCES\ntpu.sh: waiting for pile: PROVISIONING\n",
    )
    assert world.calls()[0][2:4] == ["--node-count=2", "--node-prefix=pile"]
    assert "--runtime-version=mine" in world.calls()[0]


@pytest.mark.parametrize("verb", ["create", "run"])
def test_creation_fails(world: World, verb: str):
    world.fail("create", 1)
    result = world.call(verb)
    assert result.returncode == 2
    assert result.stderr.endswith("tpu.sh: error: the queued resource pile cannot be created\n")
    assert world.verbs() == ["create"]


@pytest.mark.parametrize("verb", ["create", "run"])
def test_the_request_is_not_fulfilled(world: World, verb: str):
    world.after_create("WAITING_FOR_RESOURCES", "FAILED")
    result = world.call(verb)
    assert result.returncode == 2
    assert (
        "tpu.sh: error: the queued resource pile is FAILED; gcloud compute tpus queued-resources describe"
        in result.stderr
    )
    assert world.verbs() == ["create"]


def test_a_worker_is_not_ready_at_first(world: World):
    """Copying, installing and starting are tried again, and a worker that had started is not started twice."""
    world.fail("scp", 2)
    world.fail("ssh-1", 2)
    watched = world.watch()
    wait_until(world.both_start, watched)
    world.fail("ssh-0", 1)  # the connection drops while it is watched
    wait_until(lambda: (world.path / "failures" / "ssh-0").read_text() == "0", watched)
    world.end(0)
    status, err = finished(watched)
    assert status == 0
    assert world.verbs() == ["create", *["scp"] * 3, *["install"] * 3, "start"]
    assert "copying the code did not work on every worker (attempt 2 of 3)" in err
    assert "installing did not work on every worker (attempt 2 of 3)" in err
    assert "pile is ACTIVE, but not every worker answers (look 1 of 3)" in err
    assert world.both_start()


def test_installing_fails_on_one_worker(world: World):
    assert world.call("create").returncode == 0
    (world.path / "workers" / "1" / "no_network").touch()
    result = world.call("run")
    assert result.returncode == 2
    assert result.stderr.endswith(
        "tpu.sh: error: it cannot be installed on every worker; pile is kept, and costs money: launch/tpu.sh delete\n"
    )
    assert world.verbs() == ["create", "scp", *["install"] * 3]


def test_a_start_that_is_repeated_leaves_those_at_work_alone(world: World):
    for verb in ("create", "install", "start"):
        assert world.call(verb).returncode == 0
    wait_until(world.both_start)
    world.end(75, (1,))
    wait_until(lambda: "worker 1 75" in world.call("status").stdout)
    status = world.call("status")
    assert status.stdout == "ACTIVE\nworker 0 running\nworker 1 75\n"
    assert world.call("start").returncode == 0
    wait_until(lambda: len(world.starts(1)) == 2)
    assert len(world.starts(0)) == 1
    assert world.call("delete").returncode == 0
    assert world.calls()[-1] == ["delete", "pile", "--force", "--quiet", "--zone=us-east5-a"]


def test_stopped_by_hand(world: World):
    """Both end, and `run` with them, whatever their status; called again it goes on."""
    watched = world.watch()
    wait_until(world.both_start, watched)
    assert world.call("stop").returncode == 0
    assert finished(watched) == (0, "tpu.sh: stopped; the same command goes on from there\n")
    assert world.call("status").stdout == "ACTIVE\nworker 0 stopped\nworker 1 stopped\n"
    watched = world.watch()
    wait_until(lambda: world.both_start(2), watched)
    world.end(0)
    assert finished(watched) == (0, "tpu.sh: done; launch/tpu.sh delete gives the TPUs back\n")


def test_preempted_in_mid_run(world: World):
    """The resource is deleted, asked for again although that fails at first, and the same command is started there."""
    watched = world.watch()
    wait_until(world.both_start, watched)
    world.fail("delete", 1)
    world.fail("create", 2)
    world.set_state("SUSPENDING\nSUSPENDED")
    wait_until(lambda: world.verbs().count("start") == 2 and world.both_start(), watched)
    world.end(0)
    status, err = finished(watched)
    assert status == 0, err
    assert "tpu.sh: pile is SUSPENDED: restart 1\n" in err
    first = ["create", "scp", "install", "start"]
    assert world.verbs() == [*first, "delete", "delete", "create", "create", *first]
    assert world.starts(0) == [["-m", "latentjax.train", *FLAGS]]


def test_a_resource_that_no_longer_answers_is_created_anew(world: World):
    watched = world.watch()
    wait_until(world.both_start, watched)
    world.fail("ssh", 3)
    wait_until(lambda: world.verbs().count("start") == 2 and world.both_start(), watched)
    world.end(0)
    status, err = finished(watched)
    assert (status, err.count("not every worker answers")) == (0, 3)
    assert "pile does not answer: restart 1" in err


@pytest.mark.parametrize("ends", [{0: 143, 1: 137}, {0: 0, 1: 75}])
def test_an_end_that_is_none_is_started_again(world: World, ends: dict[int, int]):
    watched = world.watch("--max_restarts", "1")
    wait_until(world.both_start, watched)
    for worker, status in ends.items():
        world.end(status, (worker,))
    wait_until(lambda: world.both_start(2), watched)
    world.end(75)
    status, err = finished(watched)
    assert status == 2
    assert err.endswith("the run ended with status 75, after 1 restarts, which is all that --max_restarts allows\n")
    assert world.verbs() == ["create", "scp", "install", "start", "start"]


def test_a_mistake_is_not_started_again(world: World):
    """Whatever it did to the other workers; its last words are shown."""
    watched = world.watch()
    wait_until(world.both_start, watched)
    world.end(137, (0,))
    world.end(2, (1,))
    status, err = finished(watched)
    assert status == 2
    assert "the run ended with status 2, and is not started again; its last lines:\nstep 7\n" in err
    assert err.endswith("tpu.sh: pile is kept, and costs money: launch/tpu.sh delete\n")


def test_a_setup_that_fails_is_a_mistake(world: World):
    result = world.call("run", "--setup", "echo no disk; false")
    assert result.returncode == 2
    assert "no disk\ntpu_worker.sh: error: --setup ended with status 1 on 0\n" in result.stderr
    assert world.starts(0) == []


def test_a_machine_that_was_started_anew_has_lost_its_run(world: World):
    for verb in ("create", "install"):
        assert world.call(verb).returncode == 0
    for worker in (0, 1):
        (world.path / "workers" / str(worker) / "latentjax" / "run.status").write_text("running\n")
    assert world.call("status").stdout == "ACTIVE\nworker 0 137\nworker 1 137\n"


def test_google_cloud_does_not_answer(world: World):
    world.fail("describe", 3)
    result = world.call("run")
    assert result.returncode == 2
    assert result.stderr.endswith("tpu.sh: error: the state of pile cannot be found out\n")
    assert world.verbs() == []


def test_dry_run_prints_the_very_commands(world: World):
    """What it prints are the commands that a real run makes, word for word."""
    setup = ("--setup", "mkdir -p '/tmp/a b'", "--create_flag=--service-account=it's")
    printed = world.call("run", "--dry_run", *setup)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert world.calls() == []
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert [command[0] for command in commands] == ["gcloud", "gcloud", "git", "gcloud", "rm", *["gcloud"] * 3]
    watched = world.watch(*setup)
    wait_until(world.both_start, watched)
    world.end(0)
    assert finished(watched)[0] == 0
    made = world.calls()
    for command in commands:
        if command[:5] == ["gcloud", "compute", "tpus", "queued-resources", "scp"]:
            assert command[6:] == ["pile:latentjax.tar", "--node=all", "--worker=all", "--quiet", "--zone=us-east5-a"]
        elif command[0] == "gcloud":
            assert command[4:] in made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command: launch/tpu.sh run"),
        (["jump", "--name", "a", "--zone", "z"], "unknown command 'jump': one of run,"),
        (["run", "--zone", "z"], "--name must be lower-case letters, digits and dashes, not ''"),
        (["status", "--name", "A b", "--zone", "z"], "--name must be lower-case letters, digits and dashes, not 'A b'"),
        (["status", "--name", "a"], "--zone is missing"),
        (["run", "--name", "a", "--zone", "z"], "--accelerator_type is missing"),
        (["create", "--name=a", "--zone=z", "--accelerator_type=v9-8"], "no image is known for v9-8: give --runtime"),
        (["create", "--name=a", "--zone=z", "--num_slices=two"], "--num_slices must be a whole number, not 'two'"),
        (["run", "--name=a", "--zone=z", "--accelerator_type=v4-8"], "no flags for the trainer"),
        (["run", "--name=a", "--zone=z", "--poll=soon"], "--poll must be a number of seconds, not 'soon'"),
        (["run", "--nam=a"], "unknown flag --nam"),
        (["run", "--name"], "--name has no value"),
        (["run", "--name", "a", "configs/x.py"], "flags for the trainer come behind --"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str):
    result = run_script("tpu.sh", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("tpu.sh: error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_gcloud(tmp_path: Path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    for name in ("dirname", "env"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    result = run_script("tpu.sh", "status", "--name=a", "--zone=z", environment={"PATH": str(tmp_path)})
    assert (result.returncode, result.stderr) == (
        2,
        "tpu.sh: error: gcloud is not on PATH: install the Google Cloud CLI\n",
    )
