"""Which runs are of one setting, what a setting is called, and which losses may be compared."""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Any

from latentjax import config as config_lib
from latentjax.errors import UserError, brief
from latentjax.reporting.runs import RunRecord, printable
from latentjax.reporting.statistics import Estimate, estimate

SEEDS = ("data.seed", "train.seed")
# What says where, how fast and how often, and changes numbers by rounding at most: no setting is told apart by it.
_EXECUTION = re.compile(
    r"mesh\..*|checkpoint\..*|model\.(attention|loops|remat)|recurrence\.ponder_chunk_tokens"
    r"|data\.(store_cache|shard_megabytes|max_malformed|prefetch_batches|num_threads|num_workers|device_prefetch"
    r"|on_corrupt_block)"
    r"|train\.(log_every_steps|eval_every_steps|eval_tasks.*|tasks_every_steps|sample_.*|gradient_accumulation_steps"
    r"|loss_chunk_tokens|compilation_cache|lost_after_seconds|hung_after_seconds|on_bad_numbers|max_skipped_updates"
    r"|spike_.*|max_rewinds)"
)
_REFINEMENT = (
    "num_jacobi_iterations",
    "train_jacobi_iterations",
    "backprop_passes",
    "train_schedule",
    "handover_ratio",
    "train_tolerance",
    "refinement",
)
# How a knob is written in a label; others as their name and value.
_WRITTEN = {
    "model.num_layers": "{} layers",
    "model.hidden_size": "width {}",
    "model.architecture": "{}",
    "model.dtype": "{}",
    "recurrence.num_latent_thoughts": "C = {}",
    "recurrence.num_jacobi_iterations": "R = {} in evaluation",
    "recurrence.train_jacobi_iterations": "R from {}",
    "train.num_steps": "{:,} steps",
    "data.batch_size": "batch {}",
    "data.sequence_length": "sequences of {}",
    "tokenizer.fingerprint": "tokenizer {}",
}
# These go with others, and are named only where labels would be the same without.
_QUIET = ("model.intermediate_size", "model.num_heads", "model.vocab_size", "model.max_position_embeddings")


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs whose configs are the same but for seeds and for what does not change numbers.

    Attributes:
      label: unique among the settings of a report.
      runs: in the order in which they were given.
    """

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        """The runs that final numbers are of: those that came to their end, or all if none did; none that diverged."""
        sound = [run for run in self.runs if not run.diverged]
        return tuple([run for run in sound if run.is_finished] or sound)

    @property
    def final_step(self) -> int | None:
        """The last step at which all counted runs were evaluated; None if there is none."""
        steps = [set(run.held_out.steps.tolist()) for run in self.counted if len(run.held_out)]
        common = set.intersection(*steps) if steps and len(steps) == len(self.counted) else set()
        return int(max(common)) if common else None

    @property
    def is_finished(self) -> bool:
        """Whether its final numbers are of the last step of its config."""
        return self.final_step == self.runs[0].config.train.num_steps

    def final(self, read: Callable[[RunRecord, int], float]) -> Estimate | None:
        """Mean and spread of what `read` gives for each counted run and the index of its final evaluation."""
        if (step := self.final_step) is None:
            return None
        return estimate([read(run, run.held_out.steps.tolist().index(step)) for run in self.counted])

    @property
    def loss(self) -> Estimate | None:
        """Held-out loss in nats per token, at the final step."""
        return self.final(lambda run, index: run.held_out.loss[index])


def group(runs: Sequence[RunRecord], labels: Sequence[str] | None = None) -> list[Setting]:
    """Groups runs by setting, in the order of their first runs.

    Args:
      labels: one for each setting, in place of what differs between their configs.

    Raises:
      UserError: the labels are not as many as the settings, or not different.
    """
    groups: dict[Any, list[RunRecord]] = {}
    knows_tokenizers = all(run.tokenizer is not None for run in runs)
    for run in runs:
        # One that is trained on the corpus may be another with the same config.
        tokenizer = {"tokenizer.fingerprint": str(run.tokenizer)[:8]} if knows_tokenizers else {}
        groups.setdefault(tuple((effective(run) | tokenizer).items()), []).append(run)
    found = _labels([dict(key) for key in groups])
    if labels is not None:
        given = [printable(label) for label in labels]
        if len(given) != len(found):
            raise UserError(
                f"--labels names {len(given)}, but the runs are of {len(found)} settings: {'; '.join(found)}"
            )
        if len(set(given)) != len(given) or not all(given):
            raise UserError("--labels must be different from each other, and none of them empty")
        found = given
    return [Setting(label, tuple(each)) for label, each in zip(found, groups.values(), strict=True)]


def effective(run: RunRecord) -> dict[str, Any]:
    """The knobs that say what a run computes, by their dotted keys, without seeds; a knob that its method never reads
    is not among them."""
    values = {
        key: value
        for key, value in config_lib.flatten(run.config).items()
        if key not in SEEDS and not _EXECUTION.fullmatch(key)
    }
    is_vanilla = run.config.recurrence.method == "vanilla" or not run.config.recurrence.num_latent_thoughts
    if is_vanilla:
        values["recurrence.method"], values["recurrence.num_latent_thoughts"] = "vanilla", 0
        del values["recurrence.scale_embeddings"]
    if not run.iterates:
        for name in _REFINEMENT:
            del values[f"recurrence.{name}"]
    if is_vanilla or run.config.recurrence.method != "pause":
        del values["recurrence.pause_token_id"]
    return values


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """What to call each of several settings: its method, and where it differs from most of the others."""
    names = list(dict.fromkeys(key for config in configs for key in config))
    differing = [name for name in names if len({config[name] for config in configs if name in config}) > 1]
    usual = {}
    for name in differing:
        (value, count), *_ = collections.Counter(config[name] for config in configs if name in config).most_common(1)
        if count > sum(name in config for config in configs) / 2:
            usual[name] = value
    for quiet in (_QUIET, ()):
        mentioned = [name for name in differing if name not in quiet]
        labels = [_label(config, mentioned, usual) for config in configs]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({number})" for number, label in enumerate(labels, 1)]


def _label(config: dict[str, Any], differing: Sequence[str], usual: dict[str, Any]) -> str:
    method, number = config["recurrence.method"], config["recurrence.num_latent_thoughts"]
    parts = [method]
    if method == "latent" or number > 1:
        parts.append(f"C = {number}")
    for name in differing:
        known = ("recurrence.method", "recurrence.num_latent_thoughts")
        if name in config and name not in known and not (name in usual and usual[name] == config[name]):
            parts.append(_written(name, config[name]))
    return brief(", ".join(parts), 90)


def _written(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        value = "{" + ", ".join(map(str, value)) + "}"
    elif name in ("data.path", "data.tokenizer", "train.init_from"):
        value = PurePath(value).name or "none"
    elif isinstance(value, float):
        value = f"{value:g}"
    form = _WRITTEN.get(name, name.rsplit(".", 1)[1].replace("_", " ") + " {}")
    return printable(form.format(value))


def comparable_groups(settings: Sequence[Setting]) -> tuple[list[list[Setting]], list[str]]:
    """Splits settings into groups within which held-out losses mean the same: same text, tokens and length.

    Returns:
      The groups, in the order of their first settings, and one warning if there are several; then a warning for each
      thing that makes a comparison less than perfect.
    """
    all_runs = [run for setting in settings for run in setting.runs]
    knows_tokenizers = all(run.tokenizer is not None for run in all_runs)
    groups: dict[Any, list[Setting]] = {}
    identities = []
    for setting in settings:
        identities.append(_identity(setting.runs[0], knows_tokenizers))
        groups.setdefault(tuple(identities[-1].items()), []).append(setting)
    warnings = []
    if len(groups) > 1:
        aspects = [
            f"{name} ({' / '.join(brief(each, 60) for each in dict.fromkeys(map(str, seen)))})"
            for name in identities[0]
            if len(set(seen := [identity[name] for identity in identities])) > 1
        ]
        parts = "; ".join(
            f"{letter}: {', '.join(setting.label for setting in members)}"
            for letter, members in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", groups.values(), strict=False)
        )
        warnings.append(
            f"Not all runs are comparable: they differ in {', '.join(aspects)}. Losses are compared within each of "
            f"these groups alone: {parts}."
        )
    windows = {run.config.train.eval_batches * run.config.data.batch_size for run in all_runs}
    if len(windows) > 1:
        counts = " and ".join(f"{count:,}" for count in sorted(windows))
        warnings.append(
            f"The runs were evaluated on up to {counts} held-out windows: part of a difference may be the choice of "
            "text."
        )
    for setting in settings:
        seeds = [(run.config.data.seed, run.config.train.seed) for run in setting.counted]
        if len(set(seeds)) < len(seeds):
            warnings.append(
                f"{setting.label}: several runs have the same seeds; as repeats of one run they make the spread "
                "smaller than it is."
            )
    devices = sorted({run.devices for run in all_runs if run.devices})
    if len(devices) > 1:
        warnings.append(f"The runs were on different devices ({', '.join(devices)}): their times cannot be compared.")
    return list(groups.values()), warnings


def _identity(run: RunRecord, knows_tokenizers: bool) -> dict[str, Any]:
    """What has to be the same for held-out losses to be of the same thing; words to what is hashable."""
    data = run.config.data
    if data.eval_sets:
        text, split = data.eval_sets, ""
    else:
        text, split = data.mixture or data.path, f"{data.eval_fraction:g} of the documents held out"
    corpus = "" if data.eval_sets else str((data.include, data.exclude, data.text_field, data.packed_rows))
    name = f"{data.tokenizer} {data.tokenizer_vocab_size}" if data.tokenizer == "sentencepiece" else data.tokenizer
    return {
        "the corpus": printable(str(text)),
        "what is read of it": corpus,
        "the held-out split": split,
        "the tokenizer": str(run.tokenizer)[:12] if knows_tokenizers else printable(name),
        "the length of sequences": data.sequence_length,
    }
