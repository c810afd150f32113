"""`python -m latentjax.report`: what configs cost, side by side.

python -m latentjax.report --cost configs/compare.py:vanilla configs/compare.py:latent
python -m latentjax.report --cost configs/pile_1b.py --json
"""

import argparse
import json
import os
from collections.abc import Sequence

from latentjax import config as config_lib
from latentjax.command_line import LineParser, split_overrides
from latentjax.errors import UserError, run_verb


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.report",
        description="Say what configs cost, without training them.",
        epilog="Any knob of latentjax/config.py can be set, for all configs, with --config.GROUP.KEY=VALUE.",
        allow_abbrev=False,
    )
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
      UserError: anything wrong with the flags or the configs.
    """
    arguments, overrides = split_overrides(argv)
    flags = _parser().parse_args(arguments)
    if flags.cost is None:
        raise UserError("nothing to report on: give --cost and one or more recipes, such as configs/quickstart.py")
    return _report_costs(flags, overrides)


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
