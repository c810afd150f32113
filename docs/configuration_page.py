"""Writes docs/configuration.md: every knob, in the order of latentjax/config.py.

python docs/configuration_page.py            # writes the page
python docs/configuration_page.py --print    # prints it

Defaults and types come from `default()`, meanings from the comments beside it, limits from validation's tables.
"""

import argparse
import inspect
import re
from pathlib import Path
from typing import Any

from latentjax import config, validation

PAGE = Path(__file__).with_name("configuration.md")

GROUPS = {
    "model": "The architecture and how it is computed. Sizes are fixed once a run has begun.",
    "recurrence": "How the backbone is applied to every token: [methods.md](methods.md).",
    "data": "What is read, and in which order: [data.md](data.md).",
    "optimizer": "AdamW under a cosine decay. The number of steps is `train.num_steps`.",
    "train": "The loop: how long, what is evaluated on the way, what is done when something happens "
    "([reliability.md](reliability.md)).",
    "checkpoint": "When and where state is saved: [reliability.md](reliability.md).",
    "mesh": "Devices along each axis; one may be -1, the rest of them. Which sizes fit: [scaling.md](scaling.md).",
}

HEAD = """\
# Configuration

Every knob, with its default. This page is written by `python docs/configuration_page.py` from `latentjax/config.py` and
the limits in `latentjax/validation.py`; a test compares.

A recipe is a Python file whose `get_config()` changes what it needs of `latentjax.config.default()`. Any knob can be
set on the command line, and of two values for one knob the last wins:

    python -m latentjax.train --config configs/quickstart.py --config.optimizer.learning_rate=3e-3 \\
        --config.train.num_steps=200 --workdir runs/short

| type | on the command line |
| --- | --- |
| whole number | `800`, `1e6` |
| number | `0.1`, `2e-4` |
| true or false | `True`, `false` |
| text | as it is, without quotes: `runs/mine` |
| tuple | `2,3,4` or `(2, 3, 4)`; texts `a.txt,b.txt`; pairs in quotes for the shell: `'(("books", "stores/books"),)'` |

A key that does not exist is answered with the nearest that does; a value of another type, or out of its limits, with
what is allowed. Both before any device is touched. Numbers without other limits are 0 or more.

`--config.init_from` is short for `--config.train.init_from`.
"""

FOOT = """\
## What must fit together

- `model.hidden_size` is a multiple of `model.num_heads`, and that of `model.num_kv_heads`. Only llama groups queries.
- `model.rotary_fraction` of a head is an even number of dimensions: all of it (1.0) for llama, none (0.0) for gpt2.
- `data.sequence_length` is at most `model.max_position_embeddings`.
- `data.batch_size` is a multiple of `train.gradient_accumulation_steps`; the microbatch is one of the mesh's batch axes
  (`replica`, `data`, `fsdp`).
- `data.path` or `data.mixture`, not both.
- `recurrence.train_jacobi_iterations` names at least one R.
- `loop` and `ponder` take no `recurrence.backprop_passes`: their embeddings learn through the first pass alone.
- `train.tasks_every_steps` needs `train.eval_tasks`.
- With `train.spike_threshold` and `rewind`, `train.log_every_steps` is at most `checkpoint.every_steps`.
- Sizes of the mesh multiply to the number of devices.
- A model has at most 10^13 parameters, and a step at most 2^31 - 1 slots.

A run's directory keeps the knobs that say what the model is; a start with others is refused. All others may change from
one start to the next, and the change is reported.
"""


def knobs() -> dict[str, tuple[str, Any]]:
    """Returns {dotted key: (meaning, default)} in the order of the source."""
    defaults, found = config.flatten(config.default()), {}
    for line in inspect.getsource(config.default).splitlines():
        if match := re.match(r"\s+(\w+)\.(\w+) = (.+?)  # (.+)$", line):
            key = f"{match[1]}.{match[2]}"
            if key in defaults:
                found[key] = (match[4], defaults[key])
    if missing := sorted(defaults.keys() - found.keys()):
        raise ValueError(f"latentjax/config.py says of these in no comment on their line what they are: {missing}")
    return found


def limits(key: str, value: Any) -> str:
    """What validation allows of a knob, in words; "" where its type is all."""
    if key in validation._CHOICES:
        return ", ".join(f"`{choice}`" for choice in validation._CHOICES[key])
    if isinstance(value, bool | str | tuple):
        return "not empty" if key in validation._FILLED else ""
    low, high = validation._RANGES.get(key, (0, validation._LARGEST_COUNT))
    boundless = (validation._LARGEST_SIZE, validation._LARGEST_COUNT, validation._LARGEST_FLOAT)
    if key not in validation._RANGES:
        return ""
    if high in boundless:
        return f"{_number(low)} or more"
    return f"{_number(low)} to {_number(high)}"


def page() -> str:
    """The page."""
    found = knobs()
    parts = [HEAD]
    for group, about in GROUPS.items():
        rows = [
            f"| `{key}` | {_default(value)} | {_cell(meaning)} | {limits(key, value)} |"
            for key, (meaning, value) in found.items()
            if key.startswith(f"{group}.")
        ]
        head = [f"## {group}", "", about, "", "| knob | default | meaning | limits |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([*head, *rows, ""]))
    if others := {key.split(".")[0] for key in found} - GROUPS.keys():
        raise ValueError(f"groups that GROUPS of {Path(__file__).name} does not know: {sorted(others)}")
    return "\n".join([*parts, FOOT])


def _default(value: Any) -> str:
    text = repr(value)
    if isinstance(value, tuple):
        text = f"({', '.join(map(repr, value))}{',' * (len(value) == 1)})"
    return f"`{text}`".replace("'", '"')


def _number(value: float) -> str:
    exact = {validation._LARGEST_DECAY: "1 - 1e-7", 2**64 - 1: "2^64 - 1", 2**32 - 1: "2^32 - 1"}
    return exact.get(value, f"{value:g}" if isinstance(value, float) else f"{value:,}")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print it, and write nothing")
    if parser.parse_args().print:
        print(page(), end="")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
