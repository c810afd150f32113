"""Finding recipes: files of the user's, or those that come with latentjax.

In a checkout those are `configs/`; in a wheel the same files lie inside the package. Either way they go by what a
checkout calls them, `configs/NAME.py`, or by NAME alone.
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from latentjax.errors import UserError, shown

_PACKAGE = Path(__file__).parent


def shipped_recipes() -> dict[str, Path]:
    """Returns {name: path} of the recipes that come with latentjax, sorted by name."""
    return {path.stem: path for path in sorted(_shipped_directory().glob("*.py"))}


def find_recipe(text: str) -> Path:
    """Returns the file that the path or the name of a recipe stands for.

    A file of that path comes first. Where one of latentjax's own stands in for it, a line on stderr says which.

    Args:
      text: a path, or the name of a recipe that comes with latentjax; without the `:ARGUMENT` behind it.

    Raises:
      UserError: there is no such file, and no such recipe.
    """
    path = Path(text)
    try:
        if path.is_file():
            return path
    except OSError:  # a name longer than the file system has
        pass
    shipped = shipped_recipes()
    name = path.stem if text == f"configs/{path.stem}.py" else text
    if name not in shipped:
        raise UserError(
            f"no recipe at {shown(text, 160)}: give the path of a Python file, or a recipe that comes with latentjax, "
            f"such as configs/quickstart.py (there are {', '.join(shipped)})"
        )
    print(f"recipe: {shipped[name]}", file=sys.stderr, flush=True)
    return shipped[name]


@contextlib.contextmanager
def neighbours_importable(recipe: Path) -> Iterator[None]:
    """Lets a recipe import those beside it, and those that come with latentjax, by their bare names while it runs.

    They are forgotten afterwards: the next recipe may have others of the same names beside it.
    """
    directories = [str(recipe.resolve().parent), str(_shipped_directory())]
    before = set(sys.modules)
    sys.path[:0] = directories
    try:
        yield
    finally:
        for directory in directories:
            sys.path.remove(directory)
        for name in sys.modules.keys() - before:
            if str(Path(getattr(sys.modules[name], "__file__", None) or "").parent) in directories:
                del sys.modules[name]


def _shipped_directory() -> Path:
    inside = _PACKAGE / "configs"
    return inside if inside.is_dir() else _PACKAGE.parent / "configs"
