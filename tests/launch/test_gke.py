"""launch/gke.sh against a stand-in of kubectl, and the JobSets that it makes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripts import executable, run_script

STAND_IN = Path(__file__).parent / "kubectl_stand_in.py"
TPU = ("--accelerator", "tpu-v5p-slice", "--topology", "4x4x4", "--num_slices", "2")
GPU = ("--accelerator", "nvidia-h100-80gb", "--nodes", "3")
FLAGS = [
    "--config",
    "configs/a b.py",
    '--config.train.sample_prompts=it\'s "$(HOME)" & #1: @NAME@',
    "--workdir=/data/run",
]
JOBSET = "jobset.sigs.k8s.io/jobset-name=pile"


class World:
    """The cluster as far as the script can see."""

    def __init__(self, path: Path):
        self.path = path
        for name in ("bin", "failures"):
            (path / name).mkdir()
        executable(path / "bin" / "kubectl", f'exec {sys.executable} -S -E {STAND_IN} "$@"')
        self.answer("pods", "32")
        self.answer("states", "-")
        self.environment = os.environ | {"WORLD": str(path), "PATH": f"{path / 'bin'}:{os.environ['PATH']}"}

    def answer(self, name: str, *answers: str) -> None:
        """What will be answered to the next questions of a kind."""
        (self.path / name).write_text("\n".join(answers))

    def fail(self, what: str, times: int) -> None:
        """The next calls of a kind fail."""
        (self.path / "failures" / what).write_text(str(times))

    def call(self, verb: str, *further: str, flags: list[str] = FLAGS) -> subprocess.CompletedProcess:
        """Runs the script to its end."""
        arguments = [verb, "--name", "pile", "--poll", "0", *further]
        if verb in ("start", "manifest"):
            arguments += ["--image", "eu.example/latentjax:1", "--claim", "runs", "--", *flags]
        return run_script("gke.sh", *arguments, environment=self.environment)

    def calls(self) -> list[str]:
        """Every command so far."""
        path = self.path / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [" ".join(json.loads(line)) for line in lines]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def container_of(manifest: dict[str, Any]) -> dict[str, Any]:
    (job,) = manifest["spec"]["replicatedJobs"]
    (container,) = job["template"]["spec"]["template"]["spec"]["containers"]
    return container


def test_a_run_on_two_tpu_slices(world: World):
    world.answer("pods", "0", "31", "32")
    result = world.call("start", *TPU, "--spot", "--namespace", "mine", "--max_restarts", "7")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == "gke.sh: 32 of 32 pods run; launch/gke.sh logs --name pile follows them\n"
    look = f"--namespace mine get pods --selector={JOBSET} --field-selector=status.phase=Running --output=name"
    state = "--namespace mine get jobset pile --output=jsonpath={.status.terminalState}"
    assert world.calls() == [
        "--namespace mine get crd jobsets.jobset.x-k8s.io --output=name",
        "--namespace mine get persistentvolumeclaim runs --output=name",
        "--namespace mine create --filename=-",
        *[look, state] * 3,
    ]
    manifest = yaml.safe_load((world.path / "created.yaml").read_text())
    assert manifest["metadata"] == {
        "name": "pile",
        "namespace": "mine",
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16  # 64 chips, 4 of each host
    assert spec["template"]["spec"]["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    container = container_of(manifest)
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["command"] == ["python", "-m", "latentjax.train"]
    # What the user wrote; $$( is how Kubernetes is told that $( is no variable.
    assert container["args"] == [flag.replace("$(", "$$(") for flag in FLAGS]


def test_a_run_on_gpu_nodes(world: World):
    manifest = yaml.safe_load(world.call("manifest", *GPU).stdout)
    assert world.calls() == []
    (job,) = manifest["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    assert job["template"]["spec"]["parallelism"] == job["template"]["spec"]["completions"] == 3
    assert job["template"]["spec"]["completionMode"] == "Indexed"  # which is what numbers the processes
    container = container_of(manifest)
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
    # The name that JobSet gives to the first pod: JobSet, replicated job, job, pod; in the JobSet's subdomain.
    first = f"pile-{job['name']}-0-0.pile"
    processes = [f"--coordinator={first}:8482", "--num_processes=3", "--process_id=$(JOB_COMPLETION_INDEX)"]
    assert container["args"] == [*processes, *(flag.replace("$(", "$$(") for flag in FLAGS)]


@pytest.mark.parametrize("accelerator", [TPU, GPU])
def test_a_mistake_ends_the_jobset_and_everything_else_restarts_it(world: World, accelerator: tuple[str, ...]):
    """The exit statuses of docs/reliability.md."""
    manifest = yaml.safe_load(world.call("manifest", *accelerator, "--max_restarts", "7", "--grace", "60").stdout)
    policy = manifest["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1, 2]}
    assert spec["backoffLimit"] == 0  # one pod that ends is enough: the others wait for it
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["template"]["spec"]["terminationGracePeriodSeconds"] == 60


def kept(given: Any, back: Any) -> bool:
    """Whether everything given is in what came back; that may have defaults besides."""
    if isinstance(given, dict):
        return all(key in back and kept(value, back[key]) for key, value in given.items())
    if isinstance(given, list):
        return len(given) == len(back) and all(map(kept, given, back))
    return given == back


@pytest.mark.parametrize("accelerator", [TPU, GPU])
def test_the_manifest_fits_jobsets_schema(world: World, accelerator: tuple[str, ...]):
    """As the types of JobSet v1alpha2 and Kubernetes have it, in Python's form of their OpenAPI schemas."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="needs kubeflow-trainer-api, JobSet's schema")

    def through_the_schema(manifest: dict[str, Any]) -> dict[str, Any]:  # what it does not know is left out
        return json.loads(json.dumps(models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict()))

    manifest = yaml.safe_load(world.call("manifest", *accelerator, "--spot").stdout)
    assert kept(manifest, through_the_schema(manifest))
    spec = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    spec["podFailurePolicies"] = spec.pop("podFailurePolicy")
    assert not kept(manifest, through_the_schema(manifest))
    spec["backoffLimit"] = "none"
    with pytest.raises(ValueError, match="backoffLimit"):
        through_the_schema(manifest)


def test_creating_fails_at_each_step(world: World):
    for what, message in [
        ("get-crd", "this cluster knows no JobSet, or does not answer"),
        ("get-persistentvolumeclaim", "there is no claim runs in namespace default"),
        ("create", "the JobSet pile cannot be created"),
    ]:
        world.fail(what, 1)
        result = world.call("start", *TPU)
        assert result.returncode == 2
        assert f"gke.sh: error: {message}" in result.stderr
    assert [call.split()[2] for call in world.calls()] == ["get", "get", "get", "get", "get", "create"]


def test_a_pod_does_not_come_up(world: World):
    world.answer("pods", "31")
    result = world.call("start", *TPU, "--wait", "0")
    assert result.returncode == 2
    assert "pile-train-0-1-x Pending\n" in result.stderr
    assert result.stderr.endswith(
        "error: 31 of 32 pods run after 0 s; the JobSet is kept, and goes on waiting: launch/gke.sh stop\n"
    )


def test_the_run_ends_before_its_pods_are_counted(world: World):
    world.answer("pods", "0")
    world.answer("states", "-", "Failed")
    result = world.call("start", *TPU)
    assert result.returncode == 2
    assert result.stderr.endswith("gke.sh: error: the JobSet pile has failed; launch/gke.sh logs says why\n")
    world.answer("states", "-", "Completed")
    assert world.call("start", *TPU).returncode == 0


def test_logs_are_followed_over_preemptions(world: World):
    """Pods that are gone, a connection that drops, a look that fails; until the run has ended."""
    world.answer("states", "-", "-", "Completed")
    world.fail("logs", 1)
    result = world.call("logs")
    assert result.returncode == 0
    assert result.stdout == "step 7\n" * 2
    assert "gke.sh: no pod answers, or the connection dropped\n" in result.stderr
    first = f"{JOBSET},jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    assert world.calls()[0] == f"--namespace default logs --selector={first} --container=train --follow --tail=100"
    world.answer("states", "Failed")
    result = world.call("logs")
    assert (result.returncode, result.stderr) == (2, "gke.sh: error: the JobSet pile has failed\n")
    world.fail("get-jobset", 1)
    assert "there is no JobSet pile, or the cluster does not answer" in world.call("logs").stderr


def test_status_and_stop(world: World):
    result = world.call("status")
    assert (result.returncode, result.stdout.splitlines()[1]) == (0, "pile")
    assert world.call("stop").returncode == 0
    assert world.calls()[1:] == [
        f"--namespace default get pods --selector={JOBSET} --output=wide",
        "--namespace default delete jobset pile --cascade=foreground",
    ]
    world.fail("get-jobset", 1)
    world.fail("delete", 1)
    assert "gke.sh: error: there is no JobSet pile" in world.call("status").stderr
    assert world.call("stop").returncode == 2


def test_dry_run_prints_the_commands_and_the_manifest(world: World):
    result = world.call("start", *TPU, "--dry_run")
    assert world.calls() == []
    assert result.returncode == 0
    commands, manifest = result.stdout.split("\n# One run on TPU slices", 1)
    assert commands.splitlines() == [
        "kubectl --namespace default get crd jobsets.jobset.x-k8s.io --output=name ",
        "kubectl --namespace default get persistentvolumeclaim runs --output=name ",
        "kubectl --namespace default create --filename=- ",
    ]
    assert f"# One run on TPU slices{manifest}" == world.call("manifest", *TPU).stdout
    assert (
        world.call("stop", "--dry_run").stdout
        == "kubectl --namespace default delete jobset pile --cascade=foreground \n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no command: launch/gke.sh start"),
        (["jump", "--name=a"], "unknown command 'jump': one of start,"),
        (["status"], "--name must be lower-case letters, digits and dashes, not ''"),
        (["manifest", "--name=a", "--claim=c"], "--image is missing or no name: ''"),
        (["manifest", "--name=a", "--claim=c", "--image=i & j"], "--image is missing or no name: 'i & j'"),
        (["manifest", "--name=a", "--image=i", "--accelerator=x"], "--claim is missing"),
        (["manifest", "--name=a", "--image=i", "--accelerator=x", "--claim=c"], "no flags for the trainer"),
        (["manifest", "--name=a", "--image=i", "--accelerator=x", "--claim=c", "--topology=4x"], "--topology must be"),
        (
            ["manifest", "--name=a", "--image=i", "--accelerator=x", "--claim=c", "--topology=2x3", "--", "x"],
            "--topology 2x3 has 6 chips, no multiple of --chips_per_node 4",
        ),
        (["manifest", "--name=a", "--image=i", "--accelerator=x", "--claim=c", "--", "a\nb"], "has a line break: a"),
        (["manifest", "--name=a", "--image=i", "--accelerator=x", "--claim=c", "--mount=x"], "--mount must be a path"),
        (["start", "--name=a", "--nodes=two"], "--nodes must be a whole number, not 'two'"),
        (["start", "--nam=a"], "unknown flag --nam"),
        (["start", "--name"], "--name has no value"),
        (["start", "--name", "a", "configs/x.py"], "flags for the trainer come behind --"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str):
    result = run_script("gke.sh", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("gke.sh: error: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
