"""launch/slurm.sh on a real Slurm, where there is one: two processes train together, are stopped, requeued, resume."""

import contextlib
import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import recipes
from scripts import ROOT, executable, run_script
from slurm_cluster import Cluster, missing_programs

from latentjax.training.checkpoint import ARRAYS, RUN
from latentjax.training.metrics import read_metrics

# The quickstart, made small: enough steps to be stopped twice among them.
OVERRIDES = (
    "model.num_layers=1", "model.hidden_size=16", "model.intermediate_size=32", "model.max_position_embeddings=64",
    f"data.path={recipes.CORPUS}", "data.sequence_length=16", "data.eval_fraction=0.3", "mesh.data=2",
    "train.num_steps=400", "train.log_every_steps=1", "train.eval_every_steps=200", "train.eval_batches=2",
    "train.sample_every_steps=200", "train.sample_tokens=8", "train.lost_after_seconds=5",
)  # fmt: skip
OPTIONS = ("--gpus_per_node", "0", "--processes_per_node", "2", "--partition", "low", "--time", "60")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if missing := missing_programs():
        pytest.skip(f"needs a Slurm to start (apt-get install slurm-wlm munge): no {', '.join(missing)}")
    directory = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Cluster(directory)
    yield cluster
    cluster.stop()
    shutil.rmtree(directory)


class Job:
    """A job that launch/slurm.sh has submitted."""

    def __init__(self, cluster: Cluster, workdir: Path, *overrides: str, options: tuple[str, ...] = ()):
        self.cluster, self.workdir, self.log = cluster, workdir, workdir.with_suffix(".log")
        caches = [f"{key}={config}" for key, config in _caches().items()]
        flags = [f"--config.{each}" for each in (*OVERRIDES, *caches, *overrides)]
        result = run_script(
            "slurm.sh", *OPTIONS, "--log", str(self.log), *options,
            "--", "--config", str(ROOT / "configs" / "quickstart.py"), "--workdir", str(workdir), *flags,
            environment=recipes.environment(1) | cluster.settings,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        self.number = int(re.fullmatch(r"Submitted batch job (\d+)\n", result.stdout).group(1))

    def state(self) -> str:
        return self.cluster.job(self.number)["JobState"]

    def wait_for_state(self, state: str, seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while self.state() != state:
            assert time.monotonic() < deadline, f"{self.cluster.job(self.number)}\n{self.said()}"
            time.sleep(0.05)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_until(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            over = self.state() in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT", "NODE_FAIL")
            if time.monotonic() > deadline or (over and not condition()):
                raise AssertionError(f"did not come true: {self.cluster.job(self.number)}\n{self.said()}")
            time.sleep(0.05)

    def step(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            if lines := read_metrics(self.workdir / "metrics.jsonl"):
                return lines[-1]["step"]
        return 0

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step() >= step)

    def wait_for_restart(self, number: int) -> None:
        """Slurm lets a job that was requeued wait for two minutes; this does not."""
        self.wait_until(lambda: self.state() == "PENDING")
        self.cluster.run("scontrol", "update", f"JobId={self.number}", "StartTime=now")
        self.wait_until(lambda: f"slurm.sh: start {number} of job {self.number} on localhost\n" in self.said())


def _caches() -> dict[str, str]:
    config = recipes.get_config()
    return {"data.store_cache": config.data.store_cache, "train.compilation_cache": config.train.compilation_cache}


def test_two_processes_are_stopped_twice_and_have_the_metrics_of_a_run_that_was_not(cluster: Cluster, tmp_path: Path):
    """First another job takes their place, then they are cancelled and requeued by hand."""
    whole = Job(cluster, tmp_path / "whole")
    whole.wait_for_state("COMPLETED")
    assert "on 2 cpu of 2 processes (data=2)" in whole.said() and "done: 400 steps" in whole.said()
    assert "requeued" not in whole.said()

    job = Job(cluster, tmp_path / "stopped")
    job.wait_for_step(5)
    preemptor = ("sbatch", "--partition=high", "--ntasks=2", "--output=/dev/null", "--wrap=true")
    assert "Submitted" in cluster.run(*preemptor)
    job.wait_until(lambda: "slurm.sh: status 143: the job is requeued" in job.said())
    preempted = job.step()
    assert "SIGTERM: saving and leaving after this step" in job.said()
    job.wait_for_restart(1)
    job.wait_for_step(preempted + 5)
    cluster.run("scancel", str(job.number))
    job.wait_for_state("CANCELLED", seconds=60)  # on its own it is not started again
    assert job.said().count("the job is requeued") == 1
    cancelled = job.step()
    assert (job.workdir / "checkpoints" / str(cancelled)).is_dir()  # it was given the time to save
    cluster.run("scontrol", "requeue", str(job.number))
    job.wait_for_restart(2)
    job.wait_for_state("COMPLETED")
    assert f"resuming after step {preempted} of 400" in job.said()
    assert f"resuming after step {cancelled} of 400" in job.said()
    assert 5 <= preempted < cancelled < 400
    assert cluster.job(job.number)["Restarts"] == "2"
    assert recipes.comparable_metrics(job.workdir) == recipes.comparable_metrics(whole.workdir)
    assert (job.workdir / "samples.txt").read_text() == (whole.workdir / "samples.txt").read_text()
    # Arrays by their checksums: Orbax restores those of several processes only onto a mesh that it is given.
    checkpoints = [each.workdir / "checkpoints" / "400" / RUN for each in (job, whole)]
    notes = [ocp.JsonCheckpointHandler().restore(path) for path in checkpoints]
    assert notes[0][ARRAYS] == notes[1][ARRAYS]


def test_a_mistake_is_not_started_again(cluster: Cluster, tmp_path: Path):
    job = Job(cluster, tmp_path / "run", "model.num_layers=0")
    job.wait_for_state("FAILED")
    assert cluster.job(job.number)["ExitCode"] == "2:0"
    assert cluster.job(job.number)["Restarts"] == "0"
    assert "model.num_layers" in job.said()


@pytest.mark.long
def test_a_process_that_is_killed_and_the_time_limit_are_no_end(cluster: Cluster, tmp_path: Path):
    """Both processes end, the job is requeued; a minute or more before its time is up the run saves, and so again."""
    options = ("--time", "3", "--warning", "60", "--max_restarts", "2")
    job = Job(cluster, tmp_path / "run", "train.num_steps=1000000", "checkpoint.every_steps=4", options=options)
    job.wait_for_step(8)  # so that there is a checkpoint
    pids = cluster.run("pgrep", "--full", f"latentjax.train .*--workdir {job.workdir} ").split()
    subprocess.run(["kill", "-KILL", pids[-1]], check=True)
    job.wait_until(lambda: "the job is requeued" in job.said())
    assert re.search(r"slurm.sh: status (75|134|137): the job is requeued", job.said())
    job.wait_for_restart(1)
    job.wait_until(lambda: "slurm.sh: status 138: the job is requeued" in job.said())
    assert "SIGUSR1: saving and leaving after this step" in job.said()
    job.wait_for_restart(2)
    job.wait_for_state("FAILED")
    assert job.said().count("resuming after step") == 2
    assert "slurm.sh: status 138 after 2 restarts, which is all that --max_restarts allows" in job.said()


def test_dry_run_prints_the_very_command(tmp_path: Path):
    flags = ["--config", "configs/a b.py", '--config.train.sample_prompts=it\'s "$HOME"\\']
    options = ["--nodes=4", "--setup", "module load 'cuda 12'", "--time=1-00:00:00", "--account=us"]
    result = run_script("slurm.sh", *options, "--sbatch=--qos=x y", "--dry_run", "--", *flags)
    assert (result.returncode, result.stderr) == (0, "")
    assert shlex.split(result.stdout) == [
        "sbatch", "--job-name=latentjax", "--nodes=4", "--ntasks-per-node=1", "--time=1-00:00:00", "--signal=USR1@300",
        "--requeue", "--output=latentjax-%j.log", "--open-mode=append", f"--chdir={ROOT}", "--gpus-per-node=8",
        "--exclusive", "--mem=0", "--account=us", "--qos=x y", f"{ROOT}/launch/slurm.sh",
        "--in_job", "100", "module load 'cuda 12'", "python", *flags,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "restarts", "ends", "requeued"),
    [
        (0, 0, 0, False),
        (1, 0, 1, False),
        (2, 0, 2, False),
        (75, 0, 75, True),
        (137, 4, 137, True),
        (143, 5, 143, False),  # has been started again as often as it may
    ],
)
def test_what_the_trainers_status_leads_to(tmp_path: Path, status: int, restarts: int, ends: int, requeued: bool):
    """The part that runs in the job, with stand-ins for srun and scontrol; flags come to the trainer as they are."""
    executable(tmp_path / "srun", f"""printf '%s\\0' "$@" >{tmp_path}/srun.given; echo "$SET"; exit {status}""")
    executable(tmp_path / "scontrol", f"""echo "$@" >{tmp_path}/scontrol.given""")
    executable(tmp_path / "sleep", "")
    flags = ["--config", "a b.py", "--config.x=it's $HOME"]
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    setup = 'export SET="$UNSET it\'s"'
    result = run_script("slurm.sh", "--in_job", "5", setup, "/my python", *flags, environment=environment)
    assert result.returncode == ends
    assert result.stdout == f"slurm.sh: start {restarts} of job 17 on n[1-2]\n it's\n"
    given = (tmp_path / "srun.given").read_text().split("\0")[:-1]
    assert given == [
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--cpu-bind=none",
        "/my python",
        "-m",
        "latentjax.train",
        *flags,
    ]
    asked = tmp_path / "scontrol.given"
    assert asked.exists() == requeued
    assert not requeued or asked.read_text() == "requeue 17\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no flags for the trainer: launch/slurm.sh --nodes 2 -- --config"),
        (["--nodes", "two", "--", "x"], "--nodes must be a whole number, not 'two'"),
        (["--node=2", "--", "x"], "unknown flag --node"),
        (["--nodes"], "--nodes has no value"),
        (["configs/x.py"], "flags for the trainer come behind --"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str):
    result = run_script("slurm.sh", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("slurm.sh: error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_slurm(tmp_path: Path):
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    result = run_script("slurm.sh", "--", "x", environment={"PATH": str(tmp_path)})
    assert result.returncode == 2
    assert result.stderr == "slurm.sh: error: sbatch is not on PATH: run this on a login node of a Slurm cluster\n"
