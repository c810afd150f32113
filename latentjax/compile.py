"""`python -m latentjax.compile`: compiles a recipe's train step for TPUs that are not there, and says what it takes.

python -m latentjax.compile --config configs/pile_1b.py --topology v5p:4x4x4
python -m latentjax.compile --config configs/pile_1b.py --topology v5e:8x16 --num_slices 2 --config.mesh.replica=2
python -m latentjax.compile --config configs/pile_1b.py --topology v5p:4x4x4 --search

Exit status: 0 it fits, 1 it does not fit, 2 something in the flags or the recipe is wrong.
"""

import json
import os
import sys
from collections.abc import Sequence

from latentjax import config as config_lib
from latentjax.command_line import LineParser, split_overrides
from latentjax.errors import UserError, run_verb


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.compile",
        description="Compile a recipe's train step for a TPU topology, without any TPU: memory, collectives, bounds.",
        epilog="Any knob of latentjax/config.py can be set with --config.GROUP.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a recipe: configs/NAME.py, or configs/NAME.py:ARGUMENT")
    parser.add_argument("--topology", required=True, help="chips of a slice, such as v5e:4x8 or v5p:4x4x4")
    parser.add_argument("--num_slices", type=int, default=1, help="slices, which mesh.replica goes over")
    parser.add_argument("--num_jacobi_iterations", type=int, help="R of the step (default: the largest that is drawn)")
    parser.add_argument("--search", action="store_true", help="rank meshes, remat policies, microbatches")
    parser.add_argument("--search_limit", type=int, default=12, help="with --search: compile at most so many programs")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the config, the topology or libtpu.
    """
    arguments, overrides = split_overrides(argv)
    flags = _parser().parse_args(arguments)
    if flags.search_limit < 1:
        raise UserError(f"--search_limit must be at least 1, not {flags.search_limit}")
    config = config_lib.load(flags.config, overrides)
    # Before jax is imported: programs are compiled here and run nowhere, so an attached TPU is left alone.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's alarms at slow compilations: they are announced here
    from latentjax.training.report_text import report_lines, search_lines
    from latentjax.training.topology import make_topology
    from latentjax.validation import MOST_JACOBI_ITERATIONS, validate

    validate(config)
    if not 0 <= (flags.num_jacobi_iterations or 0) <= MOST_JACOBI_ITERATIONS:
        raise UserError(
            f"--num_jacobi_iterations must be from 0 to {MOST_JACOBI_ITERATIONS}, not {flags.num_jacobi_iterations}"
        )
    topology = make_topology(flags.topology, flags.num_slices)

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    if flags.search:
        from latentjax.training.search import search

        result = search(config, topology, flags.num_jacobi_iterations, flags.search_limit, note)
        _print(result.as_json() if flags.json else search_lines(result))
        return 0 if result.ranked and result.ranked[0].fits else 1
    from latentjax.training.program_report import examine

    note(f"compiling for {len(topology.devices)} devices of {topology.name} ...")
    report = examine(config, topology, flags.num_jacobi_iterations)
    _print(report.as_json() if flags.json else report_lines(report))
    return 0 if report.fits else 1


def _print(result: dict | list[str]) -> None:
    print(json.dumps(result, indent=2) if isinstance(result, dict) else "\n".join(result))


if __name__ == "__main__":
    run_verb("compile", main)
