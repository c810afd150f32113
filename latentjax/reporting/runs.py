"""What a run has left in its directory, read without trust: it may be unfinished, damaged, or going on right now."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from latentjax.data.tokenizers.base import DESCRIPTION_FILE
from latentjax.errors import UserError, brief, shown
from latentjax.opening import CONFIG, is_run, read_run_config
from latentjax.recurrence.draw import Work
from latentjax.reporting.diagnostics import Diagnostics, read_diagnostics
from latentjax.reporting.numbers import finite
from latentjax.training.cost import Cost, cost_of, flops_of_steps, works_of_steps
from latentjax.training.goodput import GOODPUT_FILE, STEPS
from latentjax.training.metrics import read_metrics
from latentjax.training.run_directory import TOKENIZER

_MOST_STEPS = 10**8  # of a log: more is damage, and would fill the memory


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of a run, one for each logged step n, in order; all float64 (n,), NaN where the log has no number.

    Attributes:
      steps: done until then.
      tokens: trained on until then.
      flops: model FLOPs of training until then (`training/flops.py`), with the R that was drawn at each step. What was
        done twice, after a kill or a rewind, is counted once.
      seconds: in training steps until then, from the logged rates; NaN throughout if there are none.
      loss: nats per token: of the step's batch, or of held-out text.
      bits_per_byte: of held-out text; NaN in the curve of training.
    """

    steps: np.ndarray
    tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    loss: np.ndarray
    bits_per_byte: np.ndarray

    def __len__(self) -> int:
        """The number of points."""
        return len(self.steps)

    def only(self, mask_n: np.ndarray) -> "Curve":
        """The points where the mask is true."""
        return Curve(*(getattr(self, field.name)[mask_n] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A run, read.

    Attributes:
      path: its directory, as it was given, in printable characters.
      config: that it was last started with.
      cost: of its config.
      training: training loss at each logged step.
      held_out: held-out loss at each evaluation that gave a number.
      residuals: steps (n,) and thought residuals (n,) of its evaluations; empty for methods that do not iterate.
      is_finished: whether it came to its last step.
      diverged: whether its last evaluation, or its last step, gave no finite number.
      wall_seconds: of all its starts, or None where nothing says.
      tokenizer: fingerprint of the one that it keeps, or None.
      devices: as summary.json names them, "" if it has not ended.
      versions: of packages, likewise.
      diagnostics: of its refinement passes, if they were measured.
      remarks: what a reader should know, each one line without the run's name.
    """

    path: str
    config: ConfigDict
    cost: Cost
    training: Curve
    held_out: Curve
    residuals: tuple[np.ndarray, np.ndarray]
    is_finished: bool
    diverged: bool
    wall_seconds: float | None
    tokenizer: str | None
    devices: str
    versions: dict[str, str]
    diagnostics: Diagnostics | None
    remarks: tuple[str, ...]

    @property
    def step(self) -> int:
        """The last that was logged."""
        return int(self.training.steps[-1]) if len(self.training) else 0

    @property
    def iterates(self) -> bool:
        """Whether its method refines thoughts."""
        return self.config.recurrence.method == "latent" and self.config.recurrence.num_latent_thoughts > 0


def read_run(directory: str) -> RunRecord:
    """Reads the directory of a run; nothing is changed there.

    Raises:
      UserError: there is no run, or its config cannot be read.
    """
    workdir = Path(directory).expanduser()
    if not (workdir / CONFIG).is_file() or not is_run(workdir):
        raise UserError(
            f"{shown(directory, 200)} is not a run: give directories that training has made, which hold a {CONFIG} "
            "and a metrics.jsonl"
        )
    config = read_run_config(workdir)
    remarks: list[str] = []
    lines = _read_lines(workdir / "metrics.jsonl", remarks)
    training = _curve(lines, config, remarks)
    evaluated_n = np.array(["eval_loss" in line for line in lines], bool)
    losses_n = np.array([finite(line.get("eval_loss")) for line in lines], np.float64)
    bits_n = np.array([finite(line.get("eval_bits_per_byte")) for line in lines], np.float64)
    residual_n = np.array([finite(line.get("thought_residual")) for line in lines], np.float64)
    held_out = dataclasses.replace(training, loss=losses_n, bits_per_byte=bits_n).only(np.isfinite(losses_n))
    summary = _read_object(workdir / "summary.json", remarks)
    step = int(training.steps[-1]) if lines else 0
    is_finished = step >= config.train.num_steps
    diverged = bool(lines) and not math.isfinite(training.loss[-1])
    if evaluated_n.any() and not np.isfinite(losses_n[evaluated_n][-1]):
        diverged = True
    _remark_on(remarks, config, step, is_finished, diverged, bool(evaluated_n.any()), summary)
    wall = finite(summary.get("wall_seconds")) if is_finished else math.nan
    if not math.isfinite(wall):
        wall = _booked_seconds(workdir / GOODPUT_FILE)
    versions = summary.get("versions")
    has_residual_n = np.isfinite(residual_n)
    return RunRecord(
        path=printable(directory),
        config=config,
        cost=cost_of(config),
        training=training,
        held_out=held_out,
        residuals=(training.steps[has_residual_n], residual_n[has_residual_n]),
        is_finished=is_finished,
        diverged=diverged,
        wall_seconds=wall if math.isfinite(wall) else None,
        tokenizer=_fingerprint(workdir / TOKENIZER / DESCRIPTION_FILE),
        devices=printable(summary.get("devices") or ""),
        versions={printable(name): printable(each) for name, each in versions.items()}
        if isinstance(versions, dict)
        else {},
        diagnostics=read_diagnostics(workdir, remarks),
        remarks=tuple(remarks),
    )


def printable(text: object) -> str:
    """Returns a text as characters that every file can hold: no control characters, no half of a surrogate pair."""
    whole = str(text).encode("utf-8", "replace").decode("utf-8")
    return brief("".join(each if each.isprintable() else " " for each in whole), 300)


def _read_lines(path: Path, remarks: list[str]) -> list[dict[str, Any]]:
    """The lines of a log in the order of their steps; what is damaged is left out, and remarked on."""
    try:
        lines = read_metrics(path)
        total = sum(bool(line.strip()) for line in path.read_bytes().splitlines()) if path.exists() else 0
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    if total > len(lines) + 1:
        remarks.append(
            f"line {len(lines) + 1} of metrics.jsonl is damaged: it and the {total - len(lines) - 1} after it are left "
            "out"
        )
    elif total > len(lines):
        remarks.append("the last line of metrics.jsonl is cut off, and left out")
    ordered: list[dict[str, Any]] = []
    for line in lines:
        if 0 < line["step"] <= _MOST_STEPS and (not ordered or line["step"] > ordered[-1]["step"]):
            ordered.append(line)
    if len(ordered) < len(lines):
        remarks.append(f"{len(lines) - len(ordered)} lines of metrics.jsonl are out of order, and left out")
    return ordered


def _curve(lines: list[dict[str, Any]], config: ConfigDict, remarks: list[str]) -> Curve:
    """The curve of the training loss."""
    steps_n = np.array([line["step"] for line in lines], np.int64)
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    works = works_of_steps(config, int(steps_n[-1]) if len(steps_n) else 0)
    if config.recurrence.train_tolerance:
        works = _as_logged(works, lines)
    elif any(
        type(line.get("num_jacobi_iterations")) is int
        and line["num_jacobi_iterations"] != works[line["step"] - 1].num_jacobi_iterations
        for line in lines
    ):
        remarks.append(
            "the log has other R than its config draws, so that they were changed on the way: training FLOPs are those "
            "of the config as it is now"
        )
    if any(line.get("tokens") != line["step"] * tokens_per_step for line in lines):
        remarks.append(
            "the log has other numbers of tokens than its config makes, so that the batch was changed on the way: "
            "tokens and training FLOPs are those of the config as it is now"
        )
    flops_n = np.cumsum(flops_of_steps(config, works))[steps_n - 1] if len(steps_n) else np.zeros(0)
    tokens_n = steps_n.astype(np.float64) * tokens_per_step
    return Curve(
        steps=steps_n.astype(np.float64),
        tokens=tokens_n,
        flops=flops_n,
        seconds=_seconds(tokens_n, [finite(line.get("tokens_per_second")) for line in lines]),
        loss=np.array([finite(line.get("loss")) for line in lines], np.float64),
        bits_per_byte=np.full(len(lines), np.nan),
    )


def _as_logged(works: list[Work], lines: list[dict[str, Any]]) -> list[Work]:
    """With the R that was found at each line, for the steps since the line before too."""
    logged, begin = list(works), 0
    for line in lines:
        found = finite(line.get("num_jacobi_iterations"))
        for step in range(begin, line["step"]):
            if works[step].num_latent_thoughts and math.isfinite(found):
                logged[step] = works[step]._replace(num_jacobi_iterations=found)
        begin = line["step"]
    return logged


def _seconds(tokens_n: np.ndarray, rates: list[float]) -> np.ndarray:
    """Time in training steps at each line: tokens since the last line with a rate, over the rate, added up.

    A rate is of the steps since the line before alone, without what was done in between: evaluating, saving, sampling.
    """
    seconds_n, spent, counted = np.full(len(tokens_n), np.nan), 0.0, 0.0
    for index, (tokens, rate) in enumerate(zip(tokens_n, rates, strict=True)):
        if math.isfinite(rate) and rate > 0:
            spent, counted = spent + (tokens - counted) / rate, tokens
            seconds_n[index] = spent
    return seconds_n


def _remark_on(
    remarks: list[str],
    config: ConfigDict,
    step: int,
    is_finished: bool,
    diverged: bool,
    was_evaluated: bool,
    summary: dict[str, Any],
) -> None:
    if not step:
        remarks.append("nothing is logged yet")
        return
    if not is_finished:
        remarks.append(f"not finished: at step {step:,} of {config.train.num_steps:,}")
    elif not summary:
        remarks.append("no summary.json: devices, versions and the whole wall time are not known")
    if diverged:
        remarks.append("its last numbers are not finite; it is left out of means")
    if not was_evaluated:
        remarks.append("never evaluated on held-out text")


def _read_object(path: Path, remarks: list[str]) -> dict[str, Any]:
    """A JSON object in a file, {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError):
        remarks.append(f"{path.name} is damaged, and left out")
        return {}
    return content


def _booked_seconds(path: Path) -> float:
    """All time that a run's account has booked; NaN if there is no account."""
    seconds = _read_object(path, []).get("seconds")
    if not isinstance(seconds, dict) or STEPS not in seconds:
        return math.nan
    return math.fsum(finite(each) for each in seconds.values())


def _fingerprint(path: Path) -> str | None:
    value = _read_object(path, []).get("fingerprint")
    return value if isinstance(value, str) else None
