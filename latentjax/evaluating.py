"""Evaluating a model: from what `open_model` opens to losses on text and scores of tasks."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from latentjax import config as config_lib
from latentjax.data.batches import eval_batches
from latentjax.data.sources import Sources, open_eval_sets
from latentjax.data.windows import Windows
from latentjax.errors import UserError
from latentjax.interop.hub import find_folder
from latentjax.opening import OpenedModel, is_run, open_model, read_run_config
from latentjax.recurrence.base import rounding_tolerance
from latentjax.recurrence.language_model import LanguageModel
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import processes, programs, run_directory
from latentjax.training.evaluation import evaluate as evaluate_sets
from latentjax.training.feeding import put_ahead
from latentjax.training.mesh import check_divisible, rows_of_process
from latentjax.training.progress import counting
from latentjax.training.scoring import Refinement, Scorer
from latentjax.validation import MOST_JACOBI_ITERATIONS, validate

_OVERRIDABLE = ("data.", "mesh.", "train.", "model.dtype")
_LONGEST_WINDOW = 2048  # of a folder, which does not say on what it was trained


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
    """The flags of the verb, read; see `latentjax.evaluate`."""

    checkpoint: str
    step: int | None
    overrides: tuple[str, ...]
    num_jacobi_iterations: int | None
    tolerance: float | None
    exact: bool
    data: tuple[str, ...]
    split: str
    eval_batches: int | None
    tasks: tuple[str, ...]
    num_fewshot: tuple[int, ...]
    limit: int | None
    include_path: str | None
    batch_tokens: int


@dataclasses.dataclass(frozen=True)
class SetResult:
    """Losses on one set, or on all together: nats per token, and bits per byte of text."""

    name: str
    loss: float
    bits_per_byte: float

    @property
    def perplexity(self) -> float:
        """exp(loss): per token."""
        return math.exp(min(self.loss, 700.0))


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """What came of it.

    Attributes:
      facts: what was evaluated, and how.
      sets: of text; the last is of all together where there are several.
      tokens: predicted in all of them; thought_residual, jacobi_iterations: see `training.evaluation.evaluate`.
      tasks: a `TaskResult` for each task and number of examples.
    """

    facts: dict[str, Any]
    sets: list[SetResult]
    tokens: int
    thought_residual: float | None
    jacobi_iterations: float | None
    tasks: list[Any]

    def as_json(self) -> dict[str, Any]:
        """Returns it for a program."""
        sets = [dataclasses.asdict(each) | {"perplexity": each.perplexity} for each in self.sets]
        text = {"sets": sets, "tokens": self.tokens, "thought_residual": self.thought_residual}
        text["mean_jacobi_iterations"] = self.jacobi_iterations
        return {
            **self.facts,
            "text": text if self.sets else None,
            "tasks": [dataclasses.asdict(each) for each in self.tasks],
            "versions": run_directory.package_versions(),
        }

    def lines(self) -> list[str]:
        """Returns it as a table."""
        facts = self.facts
        how = f"R = {facts['num_jacobi_iterations']}" if facts["tolerance"] is None else ""
        how = how or ("exact" if facts["exact"] else f"to {facts['tolerance']:g}")
        lines = [f"{facts['checkpoint']}: {facts['method']}" + (f", {how}" if facts["iterates"] else "")]
        if self.sets:
            width = max(8, *(len(each.name) for each in self.sets))
            lines += ["", f"{'text':<{width}} {'loss':>10} {'perplexity':>12} {'bits/byte':>10}"]
            lines += [
                f"{each.name:<{width}} {each.loss:>10.4f} {each.perplexity:>12,.3f} {each.bits_per_byte:>10.4f}"
                for each in self.sets
            ]
            last = [f"{self.tokens:,} tokens"]
            if self.thought_residual is not None:
                last.append(f"thought residual {self.thought_residual:.2g}")
            if self.jacobi_iterations is not None:
                last.append(f"{self.jacobi_iterations:.1f} refinement passes on average")
            lines.append(", ".join(last))
        if self.tasks:
            width = max(8, *(len(each.task) for each in self.tasks))
            metrics = max(10, *(len(metric) for each in self.tasks for metric in each.metrics))
            lines += ["", f"{'task':<{width}} {'examples':>8} {'questions':>9}  {'metric':<{metrics}} {'value':>10}"]
            for each in self.tasks:
                for metric, value in each.metrics.items():
                    error = each.errors.get(metric, math.nan)
                    tail = f" +/- {error:.4f}" if math.isfinite(error) else ""
                    lines.append(
                        f"{each.task:<{width}} {each.num_fewshot:>8} {each.num_questions:>9}  {metric:<{metrics}} "
                        f"{value:>10.4f}{tail}"
                    )
        return lines


def evaluate(request: EvaluationRequest, config: ConfigDict, note: Callable[[str], None]) -> EvaluationResult:
    """Does what the flags say; with several processes all compute together and come to the same result.

    Args:
      config: of `evaluation_config`; is changed.
      note: is told what a user should know.

    Raises:
      UserError: anything about the flags, the checkpoint, the data, the mesh or the tasks that the user can mend.
    """
    tasks = None
    if request.tasks:
        from latentjax.interop.harness import Tasks  # slow to import; and what is amiss with it is said at once

        tasks = Tasks(request.tasks, request.include_path)
    programs.use_compilation_cache(config.train.compilation_cache)
    opened = open_model(
        request.checkpoint,
        step=request.step,
        dtype=config.model.dtype,
        mesh=config.mesh,
        mask_documents=config.data.mask_documents,
        note=note,
    )
    recurrence_spec = opened.model.recurrence_spec
    if request.num_jacobi_iterations is not None:
        if request.num_jacobi_iterations > MOST_JACOBI_ITERATIONS:
            raise UserError(f"--num_jacobi_iterations must be at most {MOST_JACOBI_ITERATIONS}; or give --exact")
        recurrence_spec = dataclasses.replace(recurrence_spec, num_jacobi_iterations=request.num_jacobi_iterations)
    model = LanguageModel(opened.model.spec, recurrence_spec)
    tolerance = rounding_tolerance(model.spec.dtype) if request.exact else request.tolerance
    iterates = make_recurrence(recurrence_spec).uses_jacobi_iterations
    refinement = Refinement(recurrence_spec.num_jacobi_iterations, tolerance if iterates else None)
    found: dict[str, Any] = {"sets": [], "tokens": 0, "thought_residual": None, "jacobi_iterations": None}
    if request.data or not request.tasks:
        found = _on_text(request, config, opened, model, refinement, note)
    results = [] if tasks is None else _on_tasks(request, tasks, opened, model, refinement, note)
    facts = {
        "checkpoint": opened.source,
        "step": opened.step,
        "method": recurrence_spec.method,
        "num_latent_thoughts": recurrence_spec.num_latent_thoughts,
        "iterates": iterates,
        "num_jacobi_iterations": refinement.num_jacobi_iterations if refinement.tolerance is None else None,
        "tolerance": refinement.tolerance,
        "exact": request.exact,
        "dtype": model.spec.dtype,
    }
    return EvaluationResult(facts, **found, tasks=results)


def evaluation_config(request: EvaluationRequest) -> ConfigDict:
    """Returns the run's config, or one for a folder, on a mesh for all devices; with the user's overrides.

    Raises:
      UserError: the run's config cannot be read; an override of what is the model's, or of nothing that there is.
    """
    of_run = is_run(request.checkpoint)
    config = read_run_config(Path(request.checkpoint).expanduser()) if of_run else config_lib.default()
    config.mesh.update(config_lib.default().mesh)
    config.train.gradient_accumulation_steps = 1
    if not of_run:
        config.model.dtype = "float32"
        config.data.path = "unset"  # of training, which there is none of
        config.data.sequence_length = 0
    for override in request.overrides:
        key, _, text = override.partition("=")
        if not key.startswith(_OVERRIDABLE):
            raise UserError(
                f"--config.{key}: in evaluation the groups data, mesh and train can be set, and model.dtype; the rest "
                "is the model's"
            )
        config_lib.set_key(config, key, text)
    return config


def open_text(
    request: EvaluationRequest,
    config: ConfigDict,
    opened: OpenedModel,
    model: LanguageModel,
    note: Callable[[str], None],
) -> Sources:
    """Opens the text that the flags ask for, and makes the config say what it is evaluated with.

    Raises:
      UserError: there is none, it is of another tokenizer, or it or the batches do not fit the model or the mesh.
    """
    spec, data = model.spec, config.data
    if opened.config is None:
        if not request.data:
            raise UserError(f"{opened.source} is no run with held-out text of its own: give --data or --tasks")
        if opened.tokenizer is None:
            raise UserError(f"{opened.source} has no tokenizer, so what the ids of --data mean is not known")
        data.sequence_length = data.sequence_length or min(_LONGEST_WINDOW, spec.max_position_embeddings)
    if request.data:
        _use_tokenizer(request, data, opened)
    config.model.update({key: value for key, value in dataclasses.asdict(spec).items() if key in config.model})
    config.recurrence.update(dataclasses.asdict(model.recurrence_spec))
    validate(config)
    check_divisible(config, tuple(opened.mesh.shape.values()))
    sources = open_eval_sets(data, processes.is_first(), request.data, request.split)
    if opened.tokenizer is not None and sources.tokenizer.fingerprint != opened.tokenizer.fingerprint:
        raise UserError(
            f"{sources.description}: tokenised by another tokenizer than that of {opened.source}, so the ids mean "
            "different text: prepare it again with the model's tokenizer, or give the raw corpus"
        )
    if sources.vocab_size > spec.vocab_size:
        raise UserError(
            f"{sources.description}: ids of a vocabulary of {sources.vocab_size:,}, more than the model's "
            f"{spec.vocab_size:,}"
        )
    note(f"evaluating {opened.source} on {sources.description}")
    return sources


def text_batches(
    config: ConfigDict, sources: Sources, name: str, count: int, opened: OpenedModel, num_windows: int | None = None
) -> Iterator[dict[str, jax.Array]]:
    """Batches of one set of text, on the devices; `count` and `num_windows` as in `data.batches.eval_batches`."""
    data = config.data
    rows = rows_of_process(opened.mesh, data.batch_size)
    of_process = eval_batches(
        sources.eval_sets[name],
        data,
        count,
        eod_id=sources.eod_id,
        bytes_per_id=sources.tokenizer.bytes_per_id,
        rows=rows,
        num_windows=num_windows,
    )
    return put_ahead(of_process, opened.mesh, data.device_prefetch, rows=rows, batch_size=data.batch_size)


def _on_text(
    request: EvaluationRequest,
    config: ConfigDict,
    opened: OpenedModel,
    model: LanguageModel,
    refinement: Refinement,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Losses on text, in the trainer's windows and by its own program."""
    sources, data = open_text(request, config, opened, model, note), config.data
    counts = {
        name: min(-(-len(Windows(row, data.sequence_length)) // data.batch_size), request.eval_batches or 2**31)
        for name, row in sources.eval_sets.items()
    }
    lowered = programs.lower_eval_step(config, model, opened.mesh, opened.params, refinement.tolerance)
    eval_step, weights = programs.compile_lowered(lowered, opened.mesh), []
    processes.wait_for_all("compiled")

    def counted_step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        sums = eval_step(params, batch)
        weights.append(sums["weight_sum"])
        return sums

    batches = {name: text_batches(config, sources, name, count, opened) for name, count in counts.items()}
    with (
        counting("evaluating batches", sum(counts.values()), processes.is_first()) as advance,
        programs.memory_errors("evaluating"),
    ):
        results = evaluate_sets(counted_step, opened.params, batches, lambda: advance(1))
    sets = [SetResult("all" if len(counts) > 1 else next(iter(counts)), *_losses(results, ""))]
    if len(counts) > 1:
        sets = [SetResult(name, *_losses(results, f"/{name}")) for name in counts] + sets
    return {
        "sets": sets,
        "tokens": int(sum(float(each) for each in jax.device_get(weights))),
        "thought_residual": results.get("thought_residual"),
        "jacobi_iterations": results.get("num_jacobi_iterations"),
    }


def _losses(results: dict[str, float], of: str) -> tuple[float, float]:
    return results[f"eval_loss{of}"], results[f"eval_bits_per_byte{of}"]


def _use_tokenizer(request: EvaluationRequest, data: ConfigDict, opened: OpenedModel) -> None:
    """Has raw text tokenised by the model's own tokenizer: the one that a recipe names may be trained anew."""
    if opened.tokenizer is None:
        return
    if opened.tokenizer.kind == "bytes":
        data.tokenizer = "bytes"
        return
    if opened.config is None:
        place = find_folder(request.checkpoint)
    else:
        place = Path(request.checkpoint).expanduser() / run_directory.TOKENIZER
    if place.is_dir():
        data.tokenizer, data.eod_token = str(place), getattr(opened.tokenizer, "eod_token", "")


def _on_tasks(
    request: EvaluationRequest,
    tasks: Any,
    opened: OpenedModel,
    model: LanguageModel,
    refinement: Refinement,
    note: Callable[[str], None],
) -> list[Any]:
    """Scores of tasks, for each number of examples that is asked for."""
    from latentjax.interop.harness import PAPER_SHOTS
    from latentjax.interop.harness_text import RunText, TransformersText
    from latentjax.interop.lm_eval_adapter import LatentjaxLM

    if opened.config is None:
        text = TransformersText(find_folder(request.checkpoint))
    elif opened.tokenizer is None:
        raise UserError(f"the tokenizer of {opened.source} is not to be found, and tasks are text")
    else:
        text = RunText(opened.tokenizer)
    scorer = Scorer(
        model, opened.params, opened.mesh, refinement=refinement, batch_tokens=request.batch_tokens, note=note
    )
    shows = processes.is_first()
    adapter = LatentjaxLM(scorer, text, lambda label, total: counting(label, total, shows))
    shots = request.num_fewshot or (PAPER_SHOTS if "paper" in request.tasks else (None,))
    return [result for count in shots for result in tasks.run(adapter, count, request.limit)]
