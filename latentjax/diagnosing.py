"""Diagnosing the Jacobi iteration of a model: from what `open_model` opens to a table, and a file in its run."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from latentjax.data.windows import Windows
from latentjax.errors import UserError
from latentjax.evaluating import EvaluationRequest, evaluation_config, open_text, text_batches
from latentjax.opening import find_model, is_run, open_model
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import processes, programs, run_directory
from latentjax.training.diagnostics import DIAGNOSTICS_FILE, make_diagnostic_step
from latentjax.training.diagnostics import diagnose as diagnose_batches
from latentjax.training.mesh import BATCH_AXES
from latentjax.training.progress import counting
from latentjax.training.storage_errors import one_line
from latentjax.validation import MOST_JACOBI_ITERATIONS

_PASSES_BY_POSITION = 4  # columns of the table: R = 0 .. 3


@dataclasses.dataclass(frozen=True)
class DiagnosticsResult:
    """What came of it.

    Attributes:
      found: what `training.diagnostics.diagnose` returns, and beside it `step` (None for a folder), `checkpoint`,
        `method` and `num_latent_thoughts`.
      workdir: of the run, None for a folder.
    """

    found: dict[str, Any]
    workdir: Path | None

    def as_json(self) -> dict[str, Any]:
        """Returns it for a program."""
        return self.found | {"versions": run_directory.package_versions()}

    def lines(self) -> list[str]:
        """Returns it as tables."""
        found = self.found
        lines = [
            f"{found['checkpoint']}: {found['method']}, C = {found['num_latent_thoughts']}, {found['dtype']}; "
            f"{found['num_tokens']:,} tokens in {found['rows']} rows",
            "",
            f"{'R':>5} {'loss':>10} {'bits/byte':>10} {'thought residual':>17} {'distance from exact':>20}",
        ]
        for each in found["passes"]:
            lines.append(
                f"{each['num_jacobi_iterations']:>5} {_number(each['loss'], '.4f'):>10} "
                f"{_number(each['bits_per_byte'], '.4f'):>10} {_number(each['thought_residual'], '.2e'):>17} "
                f"{_number(each['distance_from_exact'], '.2e'):>20}"
            )
        exact = found["exact"]
        lines.append(f"{'exact':>5} {_number(exact['loss'], '.4f'):>10} {_number(exact['bits_per_byte'], '.4f'):>10}")
        lines.append("")
        for name in ("residual", "distance"):
            factor, floor = found["contraction"][name], found["rounding_floor"][name]
            fitted = f"{found['passes_fitted'][name]} passes above {floor:.1e}, where rounding begins"
            lines.append(f"{name} is multiplied by {_number(factor, '.3f')} a pass ({fitted})")
        shown = range(min(len(found["passes"]), _PASSES_BY_POSITION))
        header = "".join(f"{f'R = {index}':>10}" for index in shown)
        lines += ["", "distance from exact by position", f"{'position':>13} {'tokens':>10}{header}"]
        for each in found["by_position"]:
            place = f"{each['first_position']} - {each['last_position']}"
            distances = "".join(f"{_number(each['distance_from_exact'][index], '.2e'):>10}" for index in shown)
            lines.append(f"{place:>13} {each['num_tokens']:>10,}{distances}")
        return lines

    def keep(self) -> None:
        """Writes it into the run that it is of, whole; of a folder nothing is kept.

        Raises:
          UserError: it cannot be written.
        """
        if self.workdir is None:
            return
        path = self.workdir / DIAGNOSTICS_FILE
        try:
            run_directory.write_whole(path, json.dumps(self.as_json(), indent=2, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {path} ({one_line(error)}): mend that, or keep what was printed (--output FILE)"
            ) from error


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def diagnose(
    request: EvaluationRequest, max_jacobi_iterations: int, rows: int, note: Callable[[str], None]
) -> DiagnosticsResult:
    """Does what the flags say; with several processes all compute together and come to the same result.

    Args:
      request: of which what says how much to evaluate is passed over.
      max_jacobi_iterations: the most refinement passes that are looked at.
      rows: windows of each held-out set, spread evenly: the same ones for every step of a run.

    Raises:
      UserError: the method has nothing that iterates; whatever else about the flags, the checkpoint, the data or the
        mesh the user can mend.
    """
    if max_jacobi_iterations > MOST_JACOBI_ITERATIONS:
        raise UserError(f"--max_jacobi_iterations must be at most {MOST_JACOBI_ITERATIONS}")
    config = evaluation_config(request)
    spec = find_model(request.checkpoint, request.step, note).model.recurrence_spec
    if not make_recurrence(spec).uses_jacobi_iterations:
        raise UserError(
            f"--diagnostics: the method of {request.checkpoint} is {spec.method} (num_latent_thoughts = "
            f"{spec.num_latent_thoughts}), which does not iterate; it is for latent with one thought or more"
        )
    programs.use_compilation_cache(config.train.compilation_cache)
    opened = open_model(
        request.checkpoint,
        step=request.step,
        dtype=config.model.dtype,
        mesh=config.mesh,
        mask_documents=config.data.mask_documents,
        note=note,
    )
    model, data = opened.model, config.data
    together = int(np.prod([opened.mesh.shape[axis] for axis in BATCH_AXES]))
    data.batch_size = min(data.batch_size, -(-rows // together) * together)
    sources = open_text(request, config, opened, model, note)
    counts = {name: min(rows, len(Windows(row, data.sequence_length))) for name, row in sources.eval_sets.items()}
    num_batches = {name: -(-count // data.batch_size) for name, count in counts.items()}
    step = make_diagnostic_step(
        model, num_jacobi_iterations=max_jacobi_iterations, loss_chunk_tokens=config.train.loss_chunk_tokens
    )
    compiled = programs.compile_lowered(
        programs.lower_on_held_out(step, config, opened.mesh, opened.params), opened.mesh
    )
    batches = (
        batch
        for name, count in counts.items()
        for batch in text_batches(config, sources, name, num_batches[name], opened, count)
    )
    with (
        counting("diagnosing batches", sum(num_batches.values()), processes.is_first()) as advance,
        programs.memory_errors("diagnosing"),
    ):
        found = diagnose_batches(
            compiled,
            opened.params,
            batches,
            dtype=model.spec.dtype,
            advance=lambda: advance(1),
        )
    facts = {"checkpoint": opened.source, "method": spec.method, "num_latent_thoughts": spec.num_latent_thoughts}
    workdir = Path(request.checkpoint).expanduser() if is_run(request.checkpoint) else None
    return DiagnosticsResult({"step": opened.step} | found | facts, workdir)
