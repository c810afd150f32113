"""docs/extending.md, followed to the letter: its files and diffs make a package that trains and passes its tests."""

import csv
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import recipes
from pages import DOCS, ROOT, Block, blocks, command_lines

from latentjax.training.metrics import read_metrics

PAGE = DOCS / "extending.md"
# So that it takes seconds: a smaller model, few and short windows. Of two values the last one wins.
SMALL = (
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.rotary_fraction=0.25",
    "model.remat=none",
    "model.loops=rolled",
    "data.sequence_length=32",
    "data.eval_fraction=0.2",
    "optimizer.learning_rate=1e-2",
    "train.num_steps=40",
    "train.log_every_steps=1",
    "train.eval_every_steps=0",
    "train.sample_every_steps=0",
    "checkpoint.every_steps=40",
)


def parts_to_apply() -> list[Block]:
    return [block for block in blocks(PAGE) if block.title]


def patched(text: str, diff: str, title: str) -> str:
    """Applies a diff whose hunks are found by their lines, which must stand in the text exactly once."""
    for hunk in diff.split("@@\n")[1:]:
        lines = hunk.splitlines()
        assert all(line[:1] in ("", " ", "+", "-") for line in lines), f"{title}: no diff: {hunk}"
        before = "\n".join(line[1:] for line in lines if line[:1] != "+") + "\n"
        after = "\n".join(line[1:] for line in lines if line[:1] != "-") + "\n"
        assert text.count(before) == 1, f"docs/extending.md: {title} no longer has these lines once:\n{before}"
        text = text.replace(before, after)
    return text


def apply(root: Path, block: Block) -> None:
    path = root / block.title
    if block.language == "diff":
        path.write_text(patched(path.read_text(), block.text, block.title))
    else:
        assert not path.exists(), f"{block.title} is there already: the page adds it"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, of recipes and of what tests need, with everything on the page applied."""
    root = tmp_path_factory.mktemp("extended")
    for name in ("latentjax", "configs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("tests/conftest.py", "tests/tiny.py", "tests/data/reading.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    for block in parts_to_apply():
        apply(root, block)
    return root


def run(root: Path, *command: str) -> str:
    environment = recipes.environment() | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_page_adds_one_of_each():
    titles = [block.title for block in parts_to_apply()]
    for room in ("latentjax/recurrence/", "latentjax/models/", "latentjax/data/readers/"):
        assert any(title.startswith(room) for title in titles)
    for title in titles:
        assert len(next(block for block in parts_to_apply() if block.title == title).text.splitlines()) < 400


def test_what_is_added_trains_together(extended: Path, tmp_path: Path):
    corpus = tmp_path / "modules.csv"
    with corpus.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["name", "text"])
        rows.writerows([path.name, path.read_text()] for path in (ROOT / "latentjax" / "recurrence").glob("*.py"))
    lines = [line for block in blocks(PAGE) for line in command_lines(block.text)]
    (train,) = [line for line in lines if "recurrence.method=repeat --workdir" in line]
    program, *flags = shlex.split(train)
    assert program == "python"
    flags += [f"--config.{knob}" for knob in SMALL]
    flags += ["--config.model.architecture=neox_relu2", f"--config.data.path={corpus}"]
    flags += [f"--config.data.store_cache={tmp_path}/stores", f"--config.train.compilation_cache={tmp_path}/compiled"]
    run(extended, *flags)
    losses = [line["loss"] for line in read_metrics(extended / "runs" / "repeat" / "metrics.jsonl")]
    assert len(losses) == 40
    assert losses[0] == pytest.approx(5.55, abs=0.3)  # log 257: it knows nothing
    assert sum(losses[-5:]) / 5 < losses[0] - 1.5


def test_the_tests_of_the_page_pass(extended: Path):
    files = [block.title for block in parts_to_apply() if block.title.startswith("tests/")]
    assert len(files) == 3
    said = run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(extended), *files)
    assert "6 passed" in said


def test_a_diff_that_no_longer_fits_is_noticed():
    with pytest.raises(AssertionError, match="no longer has these lines"):
        patched("a\nb\n", "@@\n a\n-c\n+d\n", "x.py")
    assert patched("a\nb\n", "@@\n a\n-b\n+d\n", "x.py") == "a\nd\n"
