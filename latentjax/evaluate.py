"""`python -m latentjax.evaluate`: loss on held-out text, tasks of lm-evaluation-harness, and how thoughts converge.

python -m latentjax.evaluate --checkpoint runs/quickstart
python -m latentjax.evaluate --checkpoint runs/mine --step 2000 --data stores/books corpus/ --exact
python -m latentjax.evaluate --checkpoint runs/mine --diagnostics --max_jacobi_iterations 12
python -m latentjax.evaluate --checkpoint exports/mine --tasks lambada_openai,hellaswag --num_fewshot 0 5
python -m latentjax.evaluate --checkpoint runs/mine --tasks paper --output results.json --config.mesh.fsdp=8

Exit status: 0 evaluated, 2 a mistake, 75 one of several processes is gone.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from latentjax.command_line import LineParser, add_process_flags, split_overrides
from latentjax.errors import UserError, run_verb

# Of --diagnostics.
MAX_JACOBI_ITERATIONS = 8
DIAGNOSTIC_ROWS = 16


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.evaluate",
        description="Evaluate a model: loss, perplexity and bits per byte on text; tasks of lm-evaluation-harness.",
        epilog="--config.GROUP.KEY=VALUE sets knobs of the groups data, mesh and train, and model.dtype.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or a Hugging Face folder or hub id")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest that is whole)")
    passes = parser.add_argument_group("refinement passes (default: the model's own number of evaluation, R)")
    passes.add_argument("--num_jacobi_iterations", type=int, metavar="R", help="so many")
    passes.add_argument("--tolerance", type=float, help="until the thoughts change by less than this, relatively")
    passes.add_argument("--exact", action="store_true", help="until only rounding changes: as sequential decoding")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--data", nargs="+", default=[], metavar="PATH", help="token stores or raw corpora (default: as the run's own)"
    )
    text.add_argument("--split", choices=("eval", "train", "all"), help="of --data (default: eval; raw corpora: all)")
    text.add_argument("--eval_batches", type=int, help="at most so many batches of each, spread evenly (default: all)")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--tasks", default="", metavar="NAME,...", help="of lm-evaluation-harness; paper: the paper's")
    tasks.add_argument(
        "--num_fewshot", type=int, nargs="+", help="examples before a question (default: the task's own)"
    )
    tasks.add_argument("--limit", type=int, help="questions of each task (default: all)")
    tasks.add_argument("--include_path", metavar="DIRECTORY", help="YAML files of tasks of your own")
    tasks.add_argument("--batch_tokens", type=int, default=4096, help="tokens of a batch of requests (default: 4096)")
    diagnostics = parser.add_argument_group("convergence of the thoughts")
    diagnostics.add_argument(
        "--diagnostics",
        action="store_true",
        help="compare refinement passes with sequential decoding, and nothing else",
    )
    diagnostics.add_argument(
        "--max_jacobi_iterations", type=int, metavar="R", help=f"0 to R of them (default: {MAX_JACOBI_ITERATIONS})"
    )
    diagnostics.add_argument(
        "--rows", type=int, help=f"windows of each held-out set, spread evenly (default: {DIAGNOSTIC_ROWS})"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    add_process_flags(parser)
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the checkpoint, the data or the tasks.
    """
    arguments, overrides = split_overrides(argv)
    flags = _parser().parse_args(arguments)
    _check(flags)
    from latentjax.diagnosing import DiagnosticsResult, diagnose
    from latentjax.evaluating import EvaluationRequest, evaluate, evaluation_config
    from latentjax.training import processes
    from latentjax.training.last_words import EVALUATE

    request = EvaluationRequest(
        checkpoint=flags.checkpoint,
        step=flags.step,
        overrides=tuple(overrides),
        num_jacobi_iterations=flags.num_jacobi_iterations,
        tolerance=flags.tolerance,
        exact=flags.exact,
        data=tuple(flags.data),
        split=flags.split or "",
        eval_batches=flags.eval_batches,
        tasks=tuple(filter(None, flags.tasks.split(","))),
        num_fewshot=tuple(flags.num_fewshot or ()),
        limit=flags.limit,
        include_path=flags.include_path,
        batch_tokens=flags.batch_tokens,
    )

    def note(line: str) -> None:
        if processes.is_first():
            print(line, file=sys.stderr, flush=True)

    config = evaluation_config(request)
    processes.start(flags.coordinator, flags.num_processes, flags.process_id)  # before jax looks for devices
    with processes.watched(EVALUATE, config.train):
        if flags.diagnostics:
            most = MAX_JACOBI_ITERATIONS if flags.max_jacobi_iterations is None else flags.max_jacobi_iterations
            result = diagnose(request, most, DIAGNOSTIC_ROWS if flags.rows is None else flags.rows, note)
        else:
            result = evaluate(request, config, note)
    if not processes.is_first():
        return 0
    print(json.dumps(result.as_json(), indent=2) if flags.json else "\n".join(result.lines()), flush=True)
    if flags.output is not None:  # last: what cannot be written has been said
        _write(flags.output, json.dumps(result.as_json(), indent=2) + "\n")
    if isinstance(result, DiagnosticsResult):
        result.keep()  # last, so that results are not lost with a run that cannot be written to
    return 0


def _check(flags: argparse.Namespace) -> None:
    """Checks what flags say by themselves and together."""
    stated = [
        f"--{name}"
        for name in ("num_jacobi_iterations", "tolerance", "exact")
        if getattr(flags, name) not in (None, False)
    ]
    if len(stated) > 1:
        raise UserError(f"{' and '.join(stated)} do not go together: give one of them")
    if flags.diagnostics:
        others = [*stated, *(f"--{name}" for name in ("tasks", "eval_batches") if getattr(flags, name))]
        if others:
            raise UserError(
                f"--diagnostics and {others[0]} do not go together: how far it goes is said by --max_jacobi_iterations "
                "and --rows"
            )
    bounds = {"num_jacobi_iterations": 0, "max_jacobi_iterations": 1}
    for name, low in (bounds | dict.fromkeys(("rows", "eval_batches", "limit", "batch_tokens"), 1)).items():
        value = getattr(flags, name)
        if value is not None and not low <= value < 2**31:
            raise UserError(f"--{name} must be at least {low}, not {value}")
    if flags.tolerance is not None and not (0 < flags.tolerance < 1 and math.isfinite(flags.tolerance)):
        raise UserError(f"--tolerance must be between 0 and 1, not {flags.tolerance}; for none at all give --exact")
    if any(not 0 <= shots < 1000 for shots in flags.num_fewshot or ()):
        raise UserError("--num_fewshot must be numbers from 0 to 999")
    for name, needed in (
        ("split", "data"),
        ("num_fewshot", "tasks"),
        ("limit", "tasks"),
        ("include_path", "tasks"),
        ("max_jacobi_iterations", "diagnostics"),
        ("rows", "diagnostics"),
    ):
        if getattr(flags, name) is not None and not getattr(flags, needed):
            raise UserError(f"--{name} is for --{needed}, which is not given")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --output {path}: {error.strerror}") from error


if __name__ == "__main__":
    run_verb("evaluate", main)
