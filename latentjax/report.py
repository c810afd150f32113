"""`python -m latentjax.report`: runs compared on one page; and what configs cost, side by side.

python -m latentjax.report runs/vanilla-0 runs/vanilla-1 runs/latent-0 runs/latent-1 --output reports/first
python -m latentjax.report runs/* --json
python -m latentjax.report --cost configs/compare.py:vanilla configs/compare.py:latent
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from latentjax import config as config_lib
from latentjax.command_line import LineParser, split_overrides
from latentjax.errors import UserError, run_verb


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.report",
        description="Compare runs on one page, or say what configs cost without training them.",
        epilog="With --cost, any knob of latentjax/config.py can be set for all configs: --config.GROUP.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="*", metavar="RUN", help="directories of runs; their order is that of the settings"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write the page, its pictures and recipes there")
    parser.add_argument(
        "--labels", nargs="+", help="one for each setting (default: what differs between their configs)"
    )
    parser.add_argument(
        "--within", type=float, metavar="PERCENT", help="decoding costs that count as equal (default: 15)"
    )
    parser.add_argument(
        "--budgets", type=float, nargs="+", metavar="FLOPS",
        help="training FLOPs to compare at (default: those of each setting's whole training)",
    )  # fmt: skip
    parser.add_argument(
        "--cost",
        nargs="+",
        metavar="CONFIG",
        help="parameters, FLOPs, cache and token-forwards of recipes, and their ratios to the first",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the runs or the configs.
    """
    arguments, overrides = split_overrides(argv)
    flags = _parser().parse_args(arguments)
    given = [f"--{name}" for name in ("output", "labels", "within", "budgets") if getattr(flags, name) is not None]
    if flags.cost is not None:
        if flags.runs or given:
            raise UserError(
                f"--cost is of recipes, and goes without runs and without {', '.join(given) or 'their flags'}"
            )
        return _report_costs(flags, overrides)
    if not flags.runs:
        raise UserError(
            "nothing to report on: give directories of runs, or --cost and one or more recipes, such as "
            "configs/quickstart.py"
        )
    _check(flags, overrides)
    return _report_runs(flags)


def _check(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Checks what is asked of runs."""
    if overrides:
        raise UserError("--config.KEY=VALUE is for --cost: runs have the configs that they were trained with")
    if flags.output is None and not flags.json:
        raise UserError("nowhere to write the page: give --output DIR, or --json for the numbers alone")
    places = [os.path.realpath(os.path.expanduser(run)) for run in flags.runs]
    for run, place in zip(flags.runs, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{run} is given twice: give each run once")
    if flags.within is not None and not 0 <= flags.within <= 100:
        raise UserError(f"--within must be a percentage from 0 to 100, not {flags.within:g}")
    for budget in flags.budgets or ():
        if not (budget > 0 and math.isfinite(budget)):
            raise UserError(f"--budgets must be numbers of FLOPs above 0, not {budget:g}")


def _report_runs(flags: argparse.Namespace) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it counts, and computes nothing anywhere
    from latentjax.reporting.results import results_of
    from latentjax.reporting.runs import read_run
    from latentjax.reporting.settings import group
    from latentjax.reporting.writing import write_report

    def note(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    runs = [read_run(run) for run in flags.runs]
    if not any(len(run.training) for run in runs):
        raise UserError("nothing to compare: no run has logged a step yet")
    tolerance = 0.15 if flags.within is None else flags.within / 100
    budgets = None if flags.budgets is None else sorted(set(flags.budgets))
    results = results_of(group(runs, flags.labels), tolerance, budgets)
    for warning in results.warnings:
        note(f"warning: {warning}")
    if flags.output is not None:
        note(f"wrote {write_report(results, flags.output, note)}")
    if flags.json:
        print(json.dumps(results.as_json(), indent=2, allow_nan=False))
    return 0


def _report_costs(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    configs = [config_lib.load(recipe, overrides) for recipe in flags.cost]
    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: it counts, and computes nothing anywhere
    from latentjax.training.cost import cost_lines, cost_of, costs_as_json
    from latentjax.validation import validate

    for config in configs:
        validate(config)
    costs = [cost_of(config) for config in configs]
    if flags.json:
        print(json.dumps(costs_as_json(flags.cost, costs), indent=2))
    else:
        print("\n".join(cost_lines(flags.cost, costs)))
    return 0


if __name__ == "__main__":
    run_verb("report", main)
