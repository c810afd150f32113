"""Directories of runs as training leaves them, with numbers that a test knows beforehand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import recipes
from ml_collections import ConfigDict

from latentjax import config as config_lib
from latentjax.data.tokenizers.base import DESCRIPTION_FILE

RATE = 1000.0  # tokens a second
STEPS = 40


def made_config(method: str = "vanilla", **changes: Any) -> ConfigDict:
    """That of tests/recipes.py, for so many steps; `changes` are knobs with two underscores for the dot."""
    config = recipes.get_config(method)
    config.train.update(num_steps=STEPS, eval_every_steps=10)
    for key, value in changes.items():
        group, name = key.split("__")
        config[group][name] = value
    return config


def made_run(
    workdir: Path,
    config: ConfigDict,
    evaluations: Mapping[int, float | None],
    *,
    until: int | None = None,
    iterations: Mapping[int, int] | None = None,
    fingerprint: str = "f" * 64,
    devices: str = "1 x cpu",
    wall_seconds: float = 99.5,
) -> Path:
    """Writes a run.

    Args:
      evaluations: held-out loss by step; None: one that was not finite.
      until: its last step; below that of the config it is unfinished.
      iterations: R by step, where it is not 0.
    """
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config_lib.to_json(config))
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    until = config.train.num_steps if until is None else until
    lines = []
    for step in range(1, until + 1):
        line = {"step": step, "tokens": step * tokens_per_step, "loss": 5 - step / 20, "tokens_per_second": RATE}
        line["num_jacobi_iterations"] = (iterations or {}).get(step, 0)
        if step in evaluations:
            loss = evaluations[step]
            line |= {"eval_loss": loss, "eval_bits_per_byte": None if loss is None else 1.5 * loss}
            if config.recurrence.method == "latent":
                line["thought_residual"] = 0.5 / step
        lines.append(json.dumps(line))
    (workdir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (workdir / "tokenizer").mkdir()
    (workdir / "tokenizer" / DESCRIPTION_FILE).write_text(json.dumps({"kind": "bytes", "fingerprint": fingerprint}))
    if until == config.train.num_steps:
        summary = {"wall_seconds": wall_seconds, "devices": devices, "versions": {"python": "3.11.7", "jax": "0.10.2"}}
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def diagnostics(*losses: float) -> dict[str, Any]:
    """What `evaluate --diagnostics` leaves, for R = 0, 1, .. with these losses; thoughts change by 3^-R."""
    passes = [
        {
            "num_jacobi_iterations": n,
            "loss": loss,
            "bits_per_byte": 1.5 * loss,
            "thought_residual": 3.0**-n if n else None,
            "distance_from_exact": 0.5 * 3.0**-n,
        }
        for n, loss in enumerate(losses)
    ]
    return {
        "step": STEPS,
        "num_tokens": 2048,
        "rows": 16,
        "passes": passes,
        "exact": {"loss": losses[-1], "bits_per_byte": 1.5 * losses[-1]},
        "contraction": {"residual": 1 / 3, "distance": 1 / 3},
        "dtype": "float32",
    }
