"""What a run writes as it goes: metrics.jsonl, TensorBoard, samples.txt."""

import contextlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

from latentjax.training.run_directory import write_whole
from latentjax.training.storage_errors import writing
from latentjax.training.tensorboard import TensorBoardLog

# Keys of a metrics line that depend on the machine and the moment; all others are equal for equal runs, bit for bit.
TIMING_KEYS = ("tokens_per_second", "mfu")

_SAMPLE_HEADER = re.compile(r"^=== step (\d+) ===$", re.MULTILINE)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to the first that is not whole (a killed run may leave part of one)."""
    lines = []
    if path.exists():
        for text in path.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                break
            lines.append(line)
    return lines


def to_json_line(line: dict[str, Any]) -> str:
    """Returns a line of metrics.jsonl. A float that is not finite is written as null: JSON has no NaN."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class MetricsLog:
    """The logs of a run, taken up again at the step that the run resumes from."""

    def __init__(self, workdir: Path, start_step: int, writes: bool = True):
        """Opens the logs and drops all that was written after `start_step`: those steps are about to be done again.

        With `writes` false nothing is touched (all processes but the first).

        Raises:
          UserError: here and in every method: a log cannot be written; what the last checkpoint knows of is there.
        """
        self.last: dict[str, Any] = {}
        self.last_evaluation: dict[str, Any] = {}
        self._writes = writes
        if not writes:
            return
        self._path = workdir / "metrics.jsonl"
        self._samples_path = workdir / "samples.txt"
        self._tensorboard_path = workdir / "tensorboard"
        kept = [line for line in read_metrics(self._path) if line["step"] <= start_step]
        with writing(self._path):
            write_whole(self._path, "".join(map(to_json_line, kept)))
            self._file = self._path.open("a", encoding="utf-8")
        with writing(self._samples_path):
            self._cut_samples(start_step)
        with writing(self._tensorboard_path):
            self._tensorboard = TensorBoardLog(self._tensorboard_path, start_step + 1)
        evaluations = [line for line in kept if "eval_loss" in line]
        self.last = kept[-1] if kept else {}
        self.last_evaluation = evaluations[-1] if evaluations else {}

    def write(self, line: dict[str, Any]) -> None:
        """Appends one line, `step` among its keys; Python prints floats so that they read back exactly."""
        if not self._writes:
            return
        with writing(self._path):
            self._file.write(to_json_line(line))
            self._file.flush()
        with writing(self._tensorboard_path):
            for key, value in line.items():
                if key != "step" and value is not None and math.isfinite(value):
                    self._tensorboard.add_scalar(key, value, line["step"])
        self.last = line
        if "eval_loss" in line:
            self.last_evaluation = line

    def sync(self) -> None:
        """Makes sure that all lines are on disk: a checkpoint must not know of steps that the log has lost."""
        if self._writes:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def write_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """Appends generated text, each a prompt and what follows it, to samples.txt and TensorBoard."""
        if not self._writes:
            return
        # Indented, so that no text can be taken for the header of a step.
        indented = [(prompt, f"{prompt}{text}".replace("\n", "\n    ")) for prompt, text in samples]
        body = "\n".join(f"--- {prompt!r}\n    {text}\n" for prompt, text in indented)
        with writing(self._samples_path), self._samples_path.open("a", encoding="utf-8") as file:
            file.write(f"=== step {step} ===\n{body}\n")
            file.flush()
            os.fsync(file.fileno())
        with writing(self._tensorboard_path):
            self._tensorboard.add_text("samples", body, step)

    def _cut_samples(self, start_step: int) -> None:
        if not self._samples_path.exists():
            return
        # A run that was killed may have left half a character at the end.
        text = self._samples_path.read_text(encoding="utf-8", errors="replace")
        later = [match.start() for match in _SAMPLE_HEADER.finditer(text) if int(match[1]) > start_step]
        if later:
            write_whole(self._samples_path, text[: later[0]])

    def close(self) -> None:
        """Flushes and closes all logs. An error here comes too late to matter: `write` and `sync` have told of it."""
        if self._writes:
            for log in (self._file, self._tensorboard):
                with contextlib.suppress(OSError):
                    log.close()
