"""How to make the runs of a report again: a recipe for each setting, and the command of each run."""

import re
import shlex
from collections.abc import Sequence
from pathlib import PurePath

from latentjax import config as config_lib
from latentjax.reporting.runs import RunRecord
from latentjax.reporting.settings import SEEDS, Setting

_OF_ONE_RUN = ("checkpoint.directory",)  # another run must not write there


def recipe_names(settings: Sequence[Setting]) -> list[str]:
    """A file name for the recipe of each setting, from its label."""
    names: list[str] = []
    for setting in settings:
        stem = re.sub(r"[^a-z0-9]+", "-", setting.label.lower()).strip("-")[:60] or "setting"
        name = stem
        while f"{name}.py" in names:
            name = f"{stem}-{len(names) + 1}"
        names.append(f"{name}.py")
    return names


def recipe_text(setting: Setting) -> str:
    """A recipe that gives the config of a setting's first run, as `latentjax.config.load` reads it."""
    lines = [
        f"# {setting.label}: the config of {setting.runs[0].path}, where it is not the default.",
        "",
        "from latentjax.config import default",
        "",
        "",
        "def get_config():",
        "    config = default()",
    ]
    defaults = config_lib.flatten(config_lib.default())
    for key, value in config_lib.flatten(setting.runs[0].config).items():
        if value != defaults[key] and key not in _OF_ONE_RUN:
            lines.append(f"    config.{key} = {value!r}")
    return "\n".join([*lines, "    return config", ""])


def command_of(run: RunRecord, setting: Setting, recipe: str) -> str:
    """The command that makes a run again, in a directory of the same name under runs/.

    Args:
      recipe: where the recipe of the setting is.
    """
    first, own = config_lib.flatten(setting.runs[0].config), config_lib.flatten(run.config)
    flags = [
        f"--config.{key}={_argument(value)}"
        for key, value in own.items()
        if key not in _OF_ONE_RUN and (key in SEEDS or value != first[key])
    ]
    name = PurePath(run.path).name or "again"
    words = ["python", "-m", "latentjax.train", "--config", recipe, *flags, "--workdir", f"runs/{name}"]
    return shlex.join(words)


def _argument(value: object) -> str:
    return value if isinstance(value, str) else repr(value)
