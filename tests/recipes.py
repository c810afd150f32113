"""A recipe that trains in seconds, for tests that go through the command line; and ways to run it and read its runs."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from latentjax.config import default
from latentjax.training.metrics import TIMING_KEYS, read_metrics

RECIPE = Path(__file__)
ROOT = RECIPE.parent.parent
# Real text that every Python has: source of its json package.
CORPUS = Path(os.__file__).parent / "json"


def get_config(method: str = "latent") -> ConfigDict:
    """A model of a few thousand parameters on bytes, R drawn from two values."""
    config = default()
    config.model.update(
        num_layers=2, hidden_size=16, num_heads=2, intermediate_size=32, vocab_size=257, max_position_embeddings=64
    )
    config.model.dtype = "float32"
    config.recurrence.method = method
    config.recurrence.num_jacobi_iterations = 1
    config.recurrence.train_jacobi_iterations = (1, 2)
    config.data.update(path=str(CORPUS), include=("*.py",), tokenizer="bytes", sequence_length=16, batch_size=8)
    config.data.eval_fraction = 0.3
    config.data.store_cache = os.environ["LATENTJAX_TEST_CACHE"] + "/stores"
    config.optimizer.learning_rate = 1e-2
    config.train.update(num_steps=12, log_every_steps=1, eval_every_steps=4, eval_batches=2, sample_every_steps=6)
    config.train.sample_prompts = ("def ",)
    config.train.sample_tokens = 8
    config.train.compilation_cache = os.environ["LATENTJAX_TEST_CACHE"] + "/compiled"
    config.checkpoint.every_steps = 5
    return config


def command(workdir: Path, *overrides: str, recipe: str = str(RECIPE)) -> list[str]:
    """The command line of a training run."""
    flags = [f"--config.{override}" for override in overrides]
    return [sys.executable, "-m", "latentjax.train", "--config", recipe, "--workdir", str(workdir), *flags]


def environment(num_devices: int = 1) -> dict[str, str]:
    """The environment of a run on so many virtual CPU devices."""
    # Machine code hardly optimised: these programs compile for seconds and run for milliseconds.
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(workdir: Path, *overrides: str, num_devices: int = 1, recipe: str = str(RECIPE)) -> subprocess.CompletedProcess:
    """Runs the command line to its end and returns what it said."""
    return subprocess.run(
        command(workdir, *overrides, recipe=recipe),
        env=environment(num_devices),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def started(workdir: Path, *overrides: str, num_devices: int = 1, recipe: str = str(RECIPE)) -> subprocess.Popen:
    """Starts the command line and leaves it running."""
    return subprocess.Popen(
        command(workdir, *overrides, recipe=recipe),
        env=environment(num_devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def trained(workdir: Path, *overrides: str, num_devices: int = 1, recipe: str = str(RECIPE)) -> Path:
    """Runs to the end, which must succeed, and returns the run's directory."""
    result = run(workdir, *overrides, num_devices=num_devices, recipe=recipe)
    assert result.returncode == 0, result.stdout + result.stderr
    return workdir


def comparable_metrics(workdir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the machine's speed."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines]


def final_arrays(workdir: Path) -> list[np.ndarray]:
    """Every array of the newest checkpoint's state: parameters, moments and step."""
    import jax
    import orbax.checkpoint as ocp

    newest = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    restored = ocp.StandardCheckpointer().restore(workdir.absolute() / "checkpoints" / str(newest) / "state")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def assert_same_log(left: Path, right: Path) -> None:
    """Two runs have the same metrics and samples, to the last bit."""
    assert comparable_metrics(left) == comparable_metrics(right)
    assert (left / "samples.txt").read_text() == (right / "samples.txt").read_text()


def assert_same_run(left: Path, right: Path) -> None:
    """Two runs have the same metrics, samples and final state, to the last bit."""
    assert_same_log(left, right)
    for one, other in zip(final_arrays(left), final_arrays(right), strict=True):
        np.testing.assert_array_equal(one, other)
