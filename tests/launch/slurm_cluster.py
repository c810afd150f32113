"""A Slurm cluster of one node in a directory: munged, slurmctld, slurmd, as Debian's slurm-wlm and munge have them."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

_SEARCH = f"{os.environ['PATH']}:/usr/sbin"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")


def missing_programs() -> list[str]:
    """The names of those that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=_SEARCH) is None]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


class Cluster:
    """The node has two CPUs and the partitions `low` and `high`, whose jobs take the place of the former's."""

    def __init__(self, directory: Path):
        """Starts it; `directory` needs a short name, for munged's socket is in it."""
        self.directory = directory
        directory.chmod(0o700)
        key = directory / "key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for name in ("state", "spool"):
            (directory / name).mkdir()
        config = directory / "slurm.conf"
        config.write_text(self._config())
        self.settings = {"SLURM_CONF": str(config), "PATH": _SEARCH}  # what its commands find it by
        self.environment = os.environ | self.settings
        munge = [f"--{name}={directory / f'munge.{name}'}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        self._daemons: list[subprocess.Popen] = []
        try:
            self._start("munged", "--foreground", "--force", f"--key-file={key}", *munge)
            self._wait_for(lambda: (directory / "munge.socket").exists(), "munged")
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-N", "localhost")
            self._wait_for(lambda: "idle" in self.run("sinfo", "--noheader", "--format=%T"), "the node")
        except BaseException:
            self.stop()
            raise

    def _config(self) -> str:
        here, user = self.directory, getpass.getuser()
        return f"""
ClusterName=tests
SlurmctldHost=localhost
SlurmctldPort={_free_port()}
SlurmdPort={_free_port()}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={here}/munge.socket
CredType=cred/munge
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool
SlurmctldPidFile={here}/slurmctld.pid
SlurmdPidFile={here}/slurmd.pid
SlurmctldLogFile={here}/slurmctld.log
SlurmdLogFile={here}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""

    def _start(self, name: str, *arguments: str) -> None:
        with (self.directory / f"{name}.out").open("w") as out:
            command = [shutil.which(name, path=_SEARCH), *arguments]
            self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def _wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            if time.monotonic() > deadline or any(each.poll() is not None for each in self._daemons):
                logs = "".join(f"{path}:\n{path.read_text()[-2000:]}\n" for path in self.directory.glob("*.[ol][uo]*"))
                raise AssertionError(f"{what} did not come up\n{logs}")
            time.sleep(0.1)

    def run(self, *command: str) -> str:
        """Runs one of Slurm's commands and returns what it printed."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    def job(self, number: int) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", str(number)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def stop(self) -> None:
        """Ends its jobs and itself."""
        self.run("scancel", "--full", "--signal=KILL", f"--user={getpass.getuser()}")
        self.run("scancel", f"--user={getpass.getuser()}")
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
