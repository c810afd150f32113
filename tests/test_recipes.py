"""Finding recipes: files first, then those that come with latentjax, which may build on each other."""

import sys
from pathlib import Path

import pytest

from latentjax.config import flatten, load
from latentjax.errors import UserError
from latentjax.recipes import find_recipe, shipped_recipes

QUICKSTART = shipped_recipes()["quickstart"]


def test_recipes_of_the_checkout_are_those_that_come_with_it():
    assert set(shipped_recipes().values()) == set((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("text", ["configs/quickstart.py", "quickstart"])
def test_elsewhere_the_text_of_a_checkout_and_the_name_find_it(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """And what was taken is said, on stderr: the output of verbs may be JSON."""
    monkeypatch.chdir(tmp_path)
    assert find_recipe(text) == QUICKSTART
    assert capsys.readouterr() == ("", f"recipe: {QUICKSTART}\n")


def test_a_file_of_the_working_directory_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.chdir(tmp_path)
    own = Path("configs") / "quickstart.py"
    own.parent.mkdir()
    own.write_text("from latentjax.config import default as get_config\n")
    assert find_recipe(str(own)) == own
    assert capsys.readouterr() == ("", "")
    assert load(str(own)).model.num_layers != load(str(QUICKSTART)).model.num_layers


@pytest.mark.parametrize(
    "text", ["configs/none.py", "none", "quickstart.py", "elsewhere/configs/quickstart.py", "", "x" * 5000]
)
def test_nothing_else_is_taken_for_one(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A mistyped path of the user's own is no name of ours."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^no recipe at '.*there are compare, pile_160m, .*quickstart\)$") as error:
        find_recipe(text)
    assert len(str(error.value)) < 400


def test_recipes_build_on_those_beside_them_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On the command line or by name, with an argument."""
    there = flatten(load(f"{shipped_recipes()['compare']}:410m-loop"))
    monkeypatch.chdir(tmp_path)
    assert flatten(load("compare:410m-loop")) == flatten(load("configs/compare.py:410m-loop")) == there


def test_a_recipe_of_the_users_builds_on_ours(tmp_path: Path):
    """Also where it imports as late as in get_config."""
    own = tmp_path / "own.py"
    own.write_text(
        "def get_config():\n    from quickstart import get_config\n    config = get_config()\n"
        "    config.model.num_layers = 9\n    return config\n"
    )
    assert flatten(load(str(own))) == flatten(load(str(QUICKSTART))) | {"model.num_layers": 9}


def test_two_recipes_with_neighbours_of_the_same_name(tmp_path: Path):
    """Each is given its own, one after the other in one process, and nothing of them stays behind."""
    load(str(QUICKSTART))  # what loading itself imports
    before = list(sys.path), set(sys.modules)
    for number in (3, 5):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "pile_1b.py").write_text(f"LAYERS = {number}\n")
        (directory / "own.py").write_text(
            "import pile_1b\nfrom latentjax.config import default\n\ndef get_config():\n    config = default()\n"
            "    config.model.num_layers = pile_1b.LAYERS\n    return config\n"
        )
        assert load(str(directory / "own.py")).model.num_layers == number
    assert (sys.path, set(sys.modules)) == before
