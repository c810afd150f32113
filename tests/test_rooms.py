"""Imports between rooms point one way (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

import latentjax

PACKAGE = Path(latentjax.__file__).parent
# What each room may import of the others, besides errors; config is data, which training and data read.
ALLOWED = {
    "models": set(),
    "recurrence": {"models"},
    "data": {"config"},
    "training": {"models", "recurrence", "data", "config"},
    "interop": {"models", "recurrence"},
    # Beside the verbs, as `opening` is: it reads what a run has left.
    "reporting": {"training", "recurrence", "data", "config", "opening", "__version__"},
}


def imported_rooms(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("latentjax"):
            inside = node.module.split(".")[1:]
            modules |= {inside[0]} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("latentjax.")}
    return modules


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str):
    files = list((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= ALLOWED[room] | {room, "errors"}, path


def test_files_stay_short_enough_to_read():
    root = PACKAGE.parent
    for path in [*PACKAGE.rglob("*.py"), *(root / "tests").rglob("*.py"), *(root / "configs").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
