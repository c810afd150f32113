"""Exporting a model: from what `open_model` opens to a Hugging Face folder that has been compared with it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from latentjax import __version__
from latentjax.data.held_out import held_out_windows, sample_windows
from latentjax.data.tokenizers.auto_tokenizer import save_for_transformers
from latentjax.interop import comparison
from latentjax.interop import writing as folders
from latentjax.interop.exported_config import config_from_specs, is_vanilla
from latentjax.interop.hf_config import read_json
from latentjax.interop.hub import CONFIG, find_folder
from latentjax.interop.model_card import model_card
from latentjax.opening import OpenedModel, open_model
from latentjax.training.programs import sharded_tracing
from latentjax.training.run_facts import read_run_facts

_COMPARED = 4, 128  # windows, and tokens of each


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """The flags of the verb, read."""

    checkpoint: str
    step: int | None
    output: Path
    dtype: str
    max_shard_bytes: int
    checked: bool
    name: str  # under which the model will be loaded


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What came of it.

    Attributes:
      difference: None if nothing was compared.
    """

    output: Path
    source: str
    num_parameters: int
    difference: comparison.Difference | None

    @property
    def is_good(self) -> bool:
        """Whether the folder is there."""
        return self.difference is None or self.difference.is_within_tolerance

    def as_json(self) -> dict[str, Any]:
        """Returns it for a program."""
        found = None if self.difference is None else dataclasses.asdict(self.difference)
        return {
            "output": str(self.output) if self.is_good else None,
            "source": self.source,
            "parameters": self.num_parameters,
            "tolerance": comparison.TOLERANCE,
            "difference": found,
        }

    def line(self) -> str:
        """Returns it in words."""
        if self.difference is not None and not self.is_good:
            return (
                f"transformers computes something else from the export of {self.source}: {_in_words(self.difference)}; "
                f"{self.output} was not made"
            )
        compared = "not compared with transformers" if self.difference is None else _in_words(self.difference)
        return f"exported {self.source} to {self.output}: {self.num_parameters:,} parameters; {compared}"


class _MismatchError(Exception):
    """Transformers computes something else."""


def export(request: ExportRequest, note: Callable[[str], None]) -> ExportResult:
    """Writes the folder and compares; a folder that does not agree is removed again.

    Raises:
      UserError: nothing to export, nowhere to write it, or nothing to compare with.
    """
    folders.check_new(request.output)
    if request.checked:
        comparison.check_peer_is_installed()
    opened = open_model(request.checkpoint, step=request.step, note=note)
    tokens_BT, text = _windows(opened) if request.checked else (None, "")
    spec, recurrence_spec, params = opened.model.spec, opened.model.recurrence_spec, opened.params
    source_folder = find_folder(request.checkpoint) if opened.config is None else None
    difference, num_parameters = None, 0
    try:
        with folders.new_folder(request.output) as folder:
            note(f"writing {opened.source} in {request.dtype} ...")
            has_tokenizer = _write_small_files(folder, opened, request.dtype, source_folder, note)
            num_parameters = folders.write_weights(folder, params, spec, request.dtype, request.max_shard_bytes)
            if tokens_BT is not None:
                note(f"comparing with transformers on {tokens_BT.size} tokens of {text} ...")
                difference = _compare(folder, opened, params, tokens_BT, request.dtype)
                if not difference.is_within_tolerance:
                    raise _MismatchError
            checked = "Not compared with the model in JAX." if difference is None else f"{_in_words(difference)}."
            card = model_card(
                request.name,
                spec,
                recurrence_spec,
                num_parameters,
                request.dtype,
                has_tokenizer=has_tokenizer,
                facts=_facts(opened, request.checkpoint),
                checked=f"By latentjax {__version__}. {checked[0].upper()}{checked[1:]}",
            )
            (folder / "README.md").write_text(card, encoding="utf-8")
    except _MismatchError:
        pass
    return ExportResult(request.output, opened.source, num_parameters, difference)


def _write_small_files(
    folder: Path, opened: OpenedModel, dtype: str, source_folder: Path | None, note: Callable[[str], None]
) -> bool:
    """Writes all but the weights and the card; returns whether there is a tokenizer for AutoTokenizer."""
    spec, recurrence_spec, tokenizer = opened.model.spec, opened.model.recurrence_spec, opened.tokenizer
    config = config_from_specs(spec, recurrence_spec, dtype, None if tokenizer is None else tokenizer.eod_id)
    generation_config = None
    if source_folder is not None:
        # What another library has said of special tokens holds on.
        said = read_json(source_folder / CONFIG)
        config |= {key: said[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in said}
        if (source_folder / "generation_config.json").is_file():
            generation_config = read_json(source_folder / "generation_config.json")
    folders.write_configs(folder, config, generation_config)
    if not is_vanilla(recurrence_spec):
        folders.write_code(folder)
    if source_folder is not None:
        return folders.copy_tokenizer(source_folder, folder)
    if tokenizer is None:
        note(f"{opened.source} has no tokenizer any more: the folder has none either")
        return False
    if not save_for_transformers(tokenizer, folder, spec.max_position_embeddings):
        note("no tokenizer.json says what this sentencepiece model does: the folder has tokenizer.model alone")
        return False
    return True


def _windows(opened: OpenedModel) -> tuple[np.ndarray, str]:
    """Text to compare on, int32 (B, T), and what it is."""
    count, longest = _COMPARED
    num_tokens = min(longest, opened.model.spec.max_position_embeddings)
    if opened.config is not None and opened.tokenizer is not None:
        found = held_out_windows(opened.config.data, opened.tokenizer.fingerprint, count, num_tokens)
        if found is not None:
            return found, "the run's held-out text"
    vocab_size = opened.model.spec.vocab_size
    return sample_windows(opened.tokenizer, vocab_size, count, num_tokens), "English and Python text"


def _compare(
    folder: Path, opened: OpenedModel, params: Any, tokens_BT: np.ndarray, dtype: str
) -> comparison.Difference:
    """Compares, after which the parameters are gone from memory."""
    with sharded_tracing(opened.mesh):
        exact_BTV = comparison.our_logits(opened.model, params, tokens_BT)
        rounded_BTV, moved = exact_BTV, 0.0
        if dtype != "float32":
            # The folder's own numbers: what is then left over is a mistake, not the rounding.
            params = comparison.round_params(params, dtype)
            rounded_BTV = comparison.our_logits(opened.model, params, tokens_BT)
            moved = float(np.abs(rounded_BTV - exact_BTV).max())
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # before another library holds them all
    return comparison.Difference(comparison.compare(folder, rounded_BTV, tokens_BT), moved, tokens_BT.size)


def _in_words(difference: comparison.Difference) -> str:
    words = (
        f"largest difference of a logit to transformers {difference.largest:.2g} on {difference.num_tokens} tokens "
        f"(tolerance {comparison.TOLERANCE:g}, in float32 arithmetic)"
    )
    return words + (
        f"; rounding moved logits by up to {difference.from_rounding:.2g}" if difference.from_rounding else ""
    )


def _facts(opened: OpenedModel, checkpoint: str) -> dict[str, Any]:
    if opened.config is None or opened.step is None:
        return {}
    facts = read_run_facts(Path(checkpoint).expanduser(), opened.config, opened.step)
    versions = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    return {
        "step": f"{facts.step:,}",
        "tokens": f"{facts.tokens:,}",
        "data": facts.data,
        **{key: f"{value:.4f}" for key, value in facts.losses.items()},
        **facts.settings,
        **({"versions": versions} if versions else {}),
    }
