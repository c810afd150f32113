"""Command lines of several processes, of 8 devices in all, on this machine."""

import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import recipes

from latentjax.training.metrics import read_metrics


def start_together(
    workdir: Path, *overrides: str, num_processes: int = 2, recipe: str = str(recipes.RECIPE), apart: bool = False
) -> list[subprocess.Popen]:
    """Starts training in processes of 8 devices in all; `apart`: each in a directory of its own, WORKDIR/n."""
    places = [workdir / str(number) if apart else workdir for number in range(num_processes)]
    return start_processes([recipes.command(place, *overrides, recipe=recipe) for place in places])


def start_processes(commands: list[list[str]], num_devices: int = 8) -> list[subprocess.Popen]:
    """Starts command lines as processes that work together, of so many devices in all."""
    num_processes = len(commands)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    return [
        subprocess.Popen(
            [
                *command,
                *("--coordinator", coordinator, "--num_processes", str(num_processes), "--process_id", str(number)),
            ],
            env=recipes.environment(num_devices // num_processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, command in enumerate(commands)
    ]


def run_together(
    workdir: Path, *overrides: str, num_processes: int = 2, recipe: str = str(recipes.RECIPE), apart: bool = False
) -> list[subprocess.CompletedProcess]:
    """Runs training in processes of 8 devices in all, to their ends; see `start_together`."""
    return ended(start_together(workdir, *overrides, num_processes=num_processes, recipe=recipe, apart=apart))


def ended(started: list[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """Waits for the ends of processes."""
    results = []
    for process in started:
        out, err = process.communicate(timeout=300)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def wait_for_step(workdir: Path, started: list[subprocess.Popen], step: int) -> None:
    """Returns when the log of a run that goes on has reached a step."""
    deadline = time.monotonic() + 240
    while not (lines := read_metrics(workdir / "metrics.jsonl")) or lines[-1]["step"] < step:
        if time.monotonic() > deadline or any(process.poll() is not None for process in started):
            for process in started:
                process.kill()
            raise AssertionError(f"ended or hung before step {step}: {[each.communicate() for each in started]}")
        time.sleep(0.01)


def losses(workdir: Path) -> np.ndarray:
    """Losses, gradient norms and what evaluations found, of a whole run of tests/recipes.py."""
    lines = read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    keys = ("loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "thought_residual")
    return np.array([line[key] for line in lines for key in keys if key in line])
