"""Every command on every page is one that works: its flags, recipe and knobs are read by the code that would run it.

Commands go through the very `main` that they name, up to the point where work would begin. What needs a cluster, a
network or another program is on a list here, by that program; a block that is no command, no Python and on no list of
other things fails.
"""

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
import subprocess
import tomllib
from collections.abc import Iterator, Sequence

import pytest
from pages import PAGES, ROOT, Block, all_blocks

from latentjax.command_line import split_overrides
from latentjax.config import ALIASES, default, flatten, load, set_key

# Programs that are not ours, with what they would need.
OTHERS = {
    "cd": "a clone",
    "docker": "an image registry",
    "export": "a shell: it sets a variable for the next command",
    "gcloud": "a Google Cloud project",
    "git": "the repository's address",
    "kubectl": "a cluster",
    "mkdocs": "nothing that tests/docs/test_site.py does not do",
    "pyright": "nothing: the suite runs it",
    "ruff": "nothing: it is run by .ci/run",
    "scontrol": "Slurm",
    "sky": "clouds",
    "squeue": "Slurm",
    "ssh-add": "a key",
    "tail": "the log of a job",
    "tensorboard": "a browser",
    "uv": "package indices",
}
# Verbs that a fixture below stops before their work.
VERBS = ("train", "prepare", "compile", "report", "bench", "evaluate", "export", "generate")
# Blocks that are no commands, by how they begin: formulas, pseudo-code, output, trees.
NO_COMMANDS = (
    "vanilla     x1 -> x2",
    "latentjax/models/       attention",
    "z_t^1",
    "h = f(.., x_t)",
    "thoughts = none",
    "z = F(z)",
    "z(k+1) = F(z(k))",
    "z = None",
    "sqrt(2.5 D) =",
    "training:  C (C + 1)",
    "latent, decoding:",
    "decoding FLOPs   =",
    "parameters  of embedding",
    "hidden_BQD, cache = backbone",
    "corpus  --prepare-->",
    "manifest.json                what",
    "checkpoint 1200 is damaged",
    '[{"step": 1500',
    "goodput 91.3%",
    "exported ... 162,322,944",
    "chip-hours = 2.3e22",
    "hours      = 143,000",
    "R       loss  bits/byte",
    "training FLOPs = 3",
    "sum over stages of",
    "keys of a place:",
    "forwards = (R + 1)",
)

# Names that docs/extending.md adds: test_extending.py has them, and here others stand in their place.
ADDED = {"recurrence.method=repeat": "recurrence.method=loop", "architecture=neox_relu2": "architecture=gpt_neox"}


class Reached(Exception):
    """All was read, and the work would begin."""


def reach(*_, **__):
    raise Reached


def paragraphs() -> list[Block]:
    """All blocks, where indented ones that follow each other with an empty line between count as several."""
    return [
        dataclasses.replace(block, text=part.strip("\n") + "\n")
        for block in all_blocks()
        for part in ([block.text] if block.language else re.split(r"\n\n+", block.text))
    ]


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block; quotes, continued lines, here-documents, comments and `&&` understood."""
    lines = iter(re.sub(r"\\\n\s*", " ", block.text).splitlines())
    for line in lines:
        while True:
            try:
                words = list(_lexer(line))
                break
            except ValueError:  # a quotation goes on
                line += "\n" + next(lines)
        if match := re.search(r"<<'?(\w+)'?", line):
            while next(lines).strip() != match[1]:
                pass
        while words:
            end = next((place for place, word in enumerate(words) if word in ("&&", ";", "||", "|")), len(words))
            if words[:end]:
                yield [part for word in words[:end] for part in _braces(word)]
            words = words[end + 1 :]


def _lexer(line: str) -> shlex.shlex:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
    lexer.whitespace_split = True
    return lexer


def _braces(word: str) -> list[str]:
    """`a{b,c}` as a shell expands it."""
    match = re.fullmatch(r"(\S*)\{([^{}\s]+,[^{}\s]+)\}(\S*)", word)
    return [match[1] + part + match[3] for part in match[2].split(",")] if match else [word]


def is_python(text: str) -> bool:
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Import | ast.ImportFrom | ast.Call) for node in ast.walk(tree))


def kind_of(block: Block) -> str:
    """`commands`, `knobs`, `python`, `applied` (by test_extending), `other` or `unknown`."""
    first = block.text.split(maxsplit=1)[0]
    if block.title:
        return "applied"
    if block.language == "text" or block.text.lstrip().startswith(NO_COMMANDS):
        return "other"
    if first.startswith("--config."):
        return "knobs"
    if first in OTHERS or re.fullmatch(r"(\S+/)?(python3?|pip)|launch/\w+\.sh", first):
        return "commands"
    return "python" if is_python(block.text) else "unknown"


def all_commands() -> list[tuple[str, list[str]]]:
    found = [(block.page, words) for block in paragraphs() if kind_of(block) == "commands" for words in commands(block)]
    unique = {(page, *words): (page, words) for page, words in found}
    return list(unique.values())


# -- The verbs


@pytest.fixture(autouse=True)
def stops_before_the_work(monkeypatch: pytest.MonkeyPatch):
    """Each verb reads and checks what it is given, and is stopped where it would open, compile or train something."""
    from latentjax import validation

    def validate_and_stop(config):
        real_validate(config)
        raise Reached

    def load_and_stop(flags: argparse.Namespace, overrides: Sequence[str]):
        real_validate(load(flags.config, overrides))
        raise Reached

    real_validate = validation.validate
    monkeypatch.chdir(ROOT)
    for name in ("JAX_PLATFORMS", "TF_CPP_MIN_LOG_LEVEL", "XLA_PYTHON_CLIENT_PREALLOCATE"):
        monkeypatch.setenv(name, {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}.get(name, "false"))
    monkeypatch.setattr("latentjax.validation.validate", validate_and_stop)
    monkeypatch.setattr("latentjax.bench._bench_data", reach)
    monkeypatch.setattr("latentjax.bench._load", load_and_stop)
    monkeypatch.setattr("latentjax.bench._treat_memory_as_the_trainer_does", lambda: None)
    monkeypatch.setattr("latentjax.training.processes.start", lambda *_: None)
    monkeypatch.setattr("latentjax.opening.find_model", reach)  # whoever opens a model has read all flags
    monkeypatch.setattr("latentjax.evaluating.evaluate", evaluate_nothing)
    monkeypatch.setattr("latentjax.diagnosing.diagnose", evaluate_nothing)
    monkeypatch.setattr("latentjax.exporting.export", reach)
    monkeypatch.setattr("latentjax.generating.open_generator", reach)
    monkeypatch.setattr("latentjax.generating.read_prompts", lambda path: ["a prompt"])
    monkeypatch.setattr("latentjax.prepare.open_corpus", reach)
    monkeypatch.setattr("latentjax.prepare.TokenStore", reach)


def evaluate_nothing(request, *_):
    config = default()
    for override in request.overrides:
        set_key(config, *override.split("=", 1))
    raise Reached


def check_verb(verb: str, argv: list[str]) -> None:
    for added, present in ADDED.items():
        argv = [word.replace(added, present) for word in argv]
    module = importlib.import_module(f"latentjax.{verb}")
    reads_runs = verb == "report" and "--cost" not in argv
    if verb in VERBS and not reads_runs:
        with pytest.raises(Reached):
            module.main(argv)
    else:  # its flags at least
        module._parser().parse_args(split_overrides(argv)[0])


def check_python(words: list[str]) -> None:
    if words[1] == "-c" or (words[1] == "-m" and words[2] in ("venv", "pytest", "mkdocs")):
        return  # not ours, or what is running now
    if words[1] == "-m":
        package, _, verb = words[2].partition(".")
        assert package == "latentjax", words
        check_verb(verb, words[3:])
        return
    source = (ROOT / words[1]).read_text(encoding="utf-8")  # a script of the repository
    for flag in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
        assert f'"{flag}"' in source, f"{words[1]} has no flag {flag}"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if match := re.match(r"(?:\.|latentjax)\[([\w,-]+)\]", word):
            assert set(match[1].split(",")) <= set(extras), word


def check_launcher(words: list[str]) -> None:
    usage = subprocess.run(["bash", words[0], "--help"], capture_output=True, text=True, check=True).stdout
    end = words.index("--") if "--" in words else len(words)
    for flag in (word.partition("=")[0] for word in words[1:end] if word.startswith("--")):
        assert re.search(rf"{flag}\b", usage), f"{words[0]} has no flag {flag}"
    if "--" in words:
        check_verb("train", words[end + 1 :])


@pytest.mark.parametrize(("page", "words"), all_commands(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_command_is_understood(page: str, words: list[str]):
    program = words[0]
    if program.rpartition("/")[2] in ("python", "python3"):
        check_python(words)
    elif program.rpartition("/")[2] == "pip":
        check_pip(words)
    elif program.startswith("launch/"):
        check_launcher(words)
    else:
        assert program in OTHERS, f"{page}: {words}"
        for word in words:  # SkyPilot's task takes the trainer's flags in a variable
            if word.startswith("TRAIN_FLAGS="):
                check_verb("train", shlex.split(word.partition("=")[2]))


def test_every_block_is_known():
    for block in paragraphs():
        assert kind_of(block) != "unknown", (
            f"{block.page}: what begins {block.text[:60]!r} is no command that is known here: make it one, fence it as "
            "```text, or put it on a list in tests/docs/test_commands.py"
        )
    kinds = [kind_of(block) for block in paragraphs()]
    assert kinds.count("commands") > 40
    assert kinds.count("applied") > 8
    assert len(all_commands()) > 80


def test_knobs_given_alone_are_real():
    blocks = [block for block in paragraphs() if kind_of(block) == "knobs"]
    assert blocks
    for block in blocks:
        config = default()
        others, overrides = split_overrides(shlex.split(block.text.replace("\\\n", " ")))
        assert not others, block.page
        for override in overrides:
            set_key(config, *override.split("=", 1))


def test_what_python_on_the_pages_imports_is_there():
    for block in paragraphs():
        if kind_of(block) != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("latentjax"):
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), f"{block.page}: {ast.unparse(node)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_verbs_and_knobs_in_the_text_are_real(page):
    text = page.read_text(encoding="utf-8")
    for verb in set(re.findall(r"python -m latentjax\.(\w+)", text)) - {"VERB"}:
        assert (ROOT / "latentjax" / f"{verb}.py").is_file(), verb
    groups, knobs = "|".join(default().keys()), flatten(default()).keys() | ALIASES.keys()
    for knob in re.findall(rf"`(?:--config\.)?((?:{groups})\.[a-z][a-z_0-9]+)(?:=[^`]*)?`", text):
        is_file = knob.endswith((".py", ".md", ".json", ".safetensors"))
        assert knob in knobs or is_file, f"{page.name}: `{knob}` is no knob"


def test_a_command_with_a_mistake_is_noticed():
    from latentjax.errors import UserError

    for mistaken in (
        "python -m latentjax.train --config configs/pile_1b.py --config.optimizer.learning_rat=1",
        "python -m latentjax.train --config configs/nothing.py",
        "python -m latentjax.evaluate --checkpoint runs/a --task paper",
        "launch/tpu.sh run --name pile --no_such_flag",
        "python docs/plot_loss.py --no_such_flag",
        "pip install -e '.[nothing]'",
    ):
        (words,) = commands(Block("", "", "", mistaken + "\n"))
        with pytest.raises((UserError, AssertionError)):
            test_a_command_is_understood("", words)
