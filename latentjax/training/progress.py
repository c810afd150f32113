"""Showing how a run goes: a bar on a terminal, plain lines elsewhere. On stderr."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def counting(label: str, total: int, shows: bool = True, stream: TextIO | None = None) -> Iterator[Callable]:
    """Shows how far something is: `total` of them are to be done; what is yielded is called with each number done."""
    shown_on = stream or sys.stderr
    if shows and shown_on.isatty():
        with tqdm(total=total, desc=label, file=shown_on, dynamic_ncols=True) as bar:
            yield bar.update
        return
    began = said = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal said, done
        done += count
        now = time.monotonic()
        if shows and done < total and now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            left = _duration((now - began) / max(done, 1) * (total - done))
            print(f"{label}: {done:,} of {total:,}, {left} left", file=shown_on, flush=True)

    yield advance
    if shows and total:
        print(f"{label}: {total:,} in {time.monotonic() - began:.1f} s", file=shown_on, flush=True)


class TrainProgress:
    """Counts steps up to `num_steps` and shows the newest metrics with the time left."""

    def __init__(self, start_step: int, num_steps: int, stream: TextIO | None = None, shows: bool = True):
        """Begins at `start_step`; with `shows` false nothing is ever shown (all processes but the first)."""
        self._shows = shows
        self._stream = stream or sys.stderr
        self._num_steps = num_steps
        self._bar = None
        if shows and self._stream.isatty():
            self._bar = tqdm(
                total=num_steps,
                initial=start_step,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}",
            )

    def advance(self) -> None:
        """Counts one step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, line: dict[str, Any], seconds_left: float) -> None:
        """Shows a metrics line: beside the bar, or as a line of its own. Evaluations always stay to be read."""
        if self._bar is None:
            self.note(f"step {line['step']}/{self._num_steps}  {_summary(line)}  {_duration(seconds_left)} left")
            return
        self._bar.set_postfix_str(_summary({key: line[key] for key in line if not key.startswith(("eval", "task/"))}))
        if "eval_loss" in line or any(key.startswith("task/") for key in line):
            self.note(f"step {line['step']}  {_summary(line)}")

    def note(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._shows:
            return
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def _summary(line: dict[str, Any]) -> str:
    parts = [f"loss {line['loss']:.4f}"]
    if "eval_loss" in line:
        parts.append(f"eval loss {line['eval_loss']:.4f} ({line['eval_bits_per_byte']:.4f} bits/byte)")
    tasks = [f"{key.removeprefix('task/')} {value:.4f}" for key, value in line.items() if key.startswith("task/")]
    parts += [each for each in tasks if "/acc " in each or "/exact_match " in each]
    if line.get("thought_residual") is not None:
        parts.append(f"thought residual {line['thought_residual']:.3f}")
    if line["tokens_per_second"] is not None:
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s")
    if line["mfu"] is not None:
        parts.append(f"MFU {line['mfu']:.1%}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
