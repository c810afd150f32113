"""pyproject.toml, the lock and the changelog say what is so."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import latentjax

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(each) for each in PROJECT["dependencies"]]
EXTRAS = {name: list(map(Requirement, each)) for name, each in PROJECT["optional-dependencies"].items()}
LOCKED_EXTRAS = ("tests", "tasks", "gcs", "beam", "report", "docs")
# Modules that are there for what an extra brings, and are imported only where that is used.
FOR_EXTRAS = ("interop/hf/", "interop/lm_eval_adapter.py")


def names(requirements: list[Requirement]) -> set[str]:
    return {canonicalize_name(each.name) for each in requirements}


def imports(tree: ast.AST) -> set[str]:
    """The packages that are imported in so much source, but for Python's own and latentjax."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {each.name.split(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    # `compression` is Python's own from 3.14 on.
    return found - sys.stdlib_module_names - {"latentjax", "compression"}


@pytest.fixture(scope="module")
def undeclared() -> Callable[[set[str], list[Requirement]], set[str]]:
    """Which of some modules belong to none of the packages that are required."""
    owners = packages_distributions()

    def find(modules: set[str], requirements: list[Requirement]) -> set[str]:
        declared = names(requirements)
        return {each for each in modules if not declared & set(map(canonicalize_name, owners.get(each, [each])))}

    return find


@pytest.fixture(scope="module")
def sources() -> dict[str, ast.Module]:
    package = ROOT / "latentjax"
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in package.rglob("*.py")
    }


def test_what_is_imported_at_once_is_installed_with_latentjax(sources: dict[str, ast.Module], undeclared: Callable):
    """Nothing is left to what another package happens to bring."""
    for path, tree in sources.items():
        if not path.startswith(FOR_EXTRAS):
            at_once = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], [])
            assert undeclared(imports(at_once), REQUIRED) == set(), path


def test_what_is_imported_where_it_is_used_is_in_an_extra(sources: dict[str, ast.Module], undeclared: Callable):
    extras = [each for name, requirements in EXTRAS.items() if name != "tests" for each in requirements]
    for path, tree in sources.items():
        assert undeclared(imports(tree), REQUIRED + extras) == set(), path


def test_every_bound_is_one_that_the_lock_keeps():
    """Every dependency has a lower bound, and the tested versions lie within the bounds."""
    lines = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    locked: dict[str, set[str]] = {}
    for line in lines:
        pinned = Requirement(line)
        assert re.fullmatch(r"==[^,*+]+", str(pinned.specifier)), f"{line}: not one released version"
        locked.setdefault(canonicalize_name(pinned.name), set()).add(str(pinned.specifier)[2:])
    for requirement in [*REQUIRED, *(each for name in LOCKED_EXTRAS for each in EXTRAS[name])]:
        assert requirement.specifier or requirement.extras, f"{requirement} has no bound"
        versions = locked[canonicalize_name(requirement.name)]
        assert any(requirement.specifier.contains(version) for version in versions), (str(requirement), versions)


def test_the_lock_names_no_registry_and_no_path():
    """What it holds is what any registry has."""
    assert not re.search(
        r"https?:|file:|@|/(tmp|opt|home|root)/|index-url|find-links", (ROOT / "requirements.lock").read_text()
    )


def test_the_version_stands_in_one_place_and_begins_the_changelog():
    assert PROJECT["dynamic"] == ["version"]
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == latentjax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", latentjax.__version__)
    assert "version:" not in (ROOT / "CITATION.cff").read_text().replace("cff-version:", "")
