"""The sdist of this tree, the wheel that is built from it, and that the wheel works where the tree is not."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs hatchling, which builds the wheel")

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "latentjax"
CORPUS = Path(os.__file__).parent / "json"


def files(directory: Path) -> set[str]:
    """Of this tree, under a directory; without what Python and tools leave there."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not {"__pycache__", ".pytest_cache", ".hypothesis"} & set(path.parts)
    }


def build(kind: str, source: Path, output: Path) -> Path:
    """Builds by the build system that pyproject.toml names, as it is installed here."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", kind, "--directory", str(output)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True)
    (built,) = output.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    directory = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", ROOT, directory / "built")) as archive:
        archive.extractall(directory, filter="data")
    (unpacked,) = directory.glob("latentjax-*")
    return unpacked


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as installers do where there is no wheel."""
    return build("wheel", sdist, tmp_path_factory.mktemp("wheel") / "built")


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment of its own with the wheel in it, and the other packages of this one."""
    directory = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    python = directory / "bin" / "python"
    (packages,) = directory.glob("lib/python*/site-packages")
    # Not what those packages' own .pth files add, among them a checkout that is installed as editable.
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "others.pth").write_text("\n".join(paths) + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return python


def run(python: Path, directory: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python in an empty directory, or in what earlier calls left there."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    return subprocess.run(
        [str(python), *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


def verb(python: Path, directory: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs a verb, which must succeed."""
    result = run(python, directory, "-m", f"latentjax.{name}", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def test_the_sdist_has_all_that_the_tests_need(sdist: Path):
    """Every file of the directories that they read, and the pages beside them."""
    held = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    for name in ("tests", "latentjax", "configs", "launch", "docs", ".ci"):
        assert files(ROOT / name) <= held, name
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "requirements.lock"} <= held


def test_the_wheel_has_the_package_and_the_recipes_alone(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == files(PACKAGE) | {f"latentjax/{name}" for name in files(ROOT / "configs")}
    assert "latentjax/py.typed" in held


def test_recipes_are_found_in_the_wheel(python: Path, tmp_path: Path):
    """One that builds on others, by the name it has in a checkout, where there is none."""
    code = (
        "from latentjax.config import load; import latentjax;"
        "print(latentjax.__file__, load('configs/compare.py:latent').model.num_layers)"
    )
    result = run(python, tmp_path, "-c", code)
    installed = next(python.parent.parent.glob("lib/python*/site-packages")) / "latentjax"
    assert (result.stdout, result.stderr) == (
        f"{installed}/__init__.py 24\n",
        f"recipe: {installed}/configs/compare.py\n",
    )


@pytest.mark.long
def test_the_wheel_trains_exports_and_generates(python: Path, tmp_path: Path):
    """The commands of the README, for a few steps on a few files."""
    small = ["model.num_layers=1", "train.num_steps=4", "train.eval_every_steps=4", "train.eval_batches=1"]
    small += [
        f"data.path={CORPUS}",
        "data.eval_fraction=0.3",
        "data.store_cache=stores",
        "train.compilation_cache=compiled",
    ]
    trained = verb(
        python, tmp_path, "train", "--config", "configs/quickstart.py", *(f"--config.{each}" for each in small)
    )
    assert "done: 4 steps" in trained.stdout
    run_directory = "runs/quickstart"
    assert "loss" in verb(python, tmp_path, "evaluate", "--checkpoint", run_directory).stdout
    check = [] if find_spec("torch") and find_spec("transformers") else ["--no_check"]
    verb(python, tmp_path, "export", "--checkpoint", run_directory, "--output", "exported", *check)
    for model in (run_directory, "exported"):
        said = verb(
            python, tmp_path, "generate", "--checkpoint", model, "--prompt", "def ", "--max_new_tokens", "8"
        ).stdout
        assert said.startswith("def ") and len(said) > len("def \n")


@pytest.mark.long
def test_tests_run_from_the_sdist(sdist: Path):
    """Those that read the most of what lies beside the package."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "tests/test_rooms.py",
            "tests/test_recipes.py",
            "tests/launch/test_files.py",
        ],
        cwd=sdist,
        env=os.environ | {"PYTHONPATH": str(sdist)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
