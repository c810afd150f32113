"""What a run says of itself at a step, for whoever publishes its model."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from latentjax.training.metrics import read_metrics


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """What is known of a run; what is not is left out.

    Attributes:
      step: of the checkpoint.
      tokens: trained on until then.
      data: names of the stores or corpora, without the places where they lie.
      losses: the last before or at the step, by their keys in metrics.jsonl.
      settings: of the training, by the keys of the config.
      versions: of packages, from the run's summary, if it has ended.
    """

    step: int
    tokens: int
    data: str
    losses: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]


_SETTINGS = (
    "data.sequence_length",
    "data.batch_size",
    "data.mask_documents",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "recurrence.train_jacobi_iterations",
    "recurrence.backprop_passes",
    "recurrence.train_schedule",
    "recurrence.handover_ratio",
    "recurrence.train_tolerance",
    "recurrence.refinement",
    "train.num_steps",
    "train.seed",
)


def read_run_facts(workdir: Path, config: ConfigDict, step: int) -> RunFacts:
    """Gathers them from config, metrics.jsonl and summary.json; the last two may be missing."""
    losses: dict[str, float] = {}
    for line in read_metrics(workdir / "metrics.jsonl"):
        if line["step"] <= step:
            named = {key: value for key, value in line.items() if key.startswith(("loss", "eval_"))}
            losses |= {key: value for key, value in named.items() if isinstance(value, float)}
    names = [(Path(path).name, weight) for path, weight in config.data.mixture] or [(Path(config.data.path).name, 1.0)]
    return RunFacts(
        step=step,
        tokens=step * config.data.batch_size * config.data.sequence_length,
        data=", ".join(name if len(names) == 1 else f"{name} (weight {weight:g})" for name, weight in names),
        losses=losses,
        settings={key: config[key.split(".")[0]][key.split(".")[1]] for key in _SETTINGS},
        versions=_versions(workdir / "summary.json"),
    )


def _versions(path: Path) -> dict[str, str]:
    try:
        versions = json.loads(path.read_text(encoding="utf-8"))["versions"]
        return {str(name): str(version) for name, version in versions.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
