"""What it costs that updates which are not finite are skipped: the step as it is, against one that takes every update.

    python tests/training/skipping_cost.py configs/quickstart.py [GROUP.KEY=VALUE ...]
    python tests/training/skipping_cost.py --topology v5p:2x2x1 configs/pile_70m.py

The first takes turns on the devices that are here; the second compiles both for TPUs that are not.
"""

import argparse
import dataclasses
import json
import statistics

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from latentjax.config import load
from latentjax.training import host_memory, step
from latentjax.training.circumstances import circumstance_lines
from latentjax.training.hlo import parse
from latentjax.training.hlo_costs import count_costs
from latentjax.training.mesh import make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.programs import compile_lowered, lower_train_step, make_model, schedule_of
from latentjax.training.state import abstract_state, create_state
from latentjax.training.step_benchmark import device_batch, time_steps
from latentjax.training.topology import make_topology
from latentjax.validation import validate

KINDS = ("skipping", "plain")


def compile_both(config: ConfigDict, devices: list[jax.Device]) -> dict[str, jax.stages.Compiled]:
    """The step of the smallest R, as it is and without the choice."""
    mesh, programs = make_mesh(config, devices), {}
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, config.train.num_steps)
    for kind in KINDS:
        with pytest.MonkeyPatch.context() as patch:
            if kind == "plain":
                patch.setattr(step, "keep_unless", lambda taken, after, before: after)
            abstract = abstract_state(model, optimizer, mesh)
            lowered = lower_train_step(config, model, mesh, abstract, schedule_of(config).works[0])
        programs[kind] = compile_lowered(lowered, mesh)
    return programs


def compare_times(config: ConfigDict, rounds: int, steps: int) -> None:
    """Prints seconds of a step by turns, and their ratio."""
    mesh = make_mesh(config, jax.devices())
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, config.train.num_steps)
    programs, batch = compile_both(config, jax.devices()), device_batch(config, mesh)
    states = {kind: create_state(model, optimizer, mesh, config.train.seed) for kind in KINDS}
    seconds = {kind: [] for kind in KINDS}
    for turn in range(rounds + 1):  # the first one warms up
        for kind in KINDS if turn % 2 else KINDS[::-1]:
            states[kind], elapsed = time_steps(programs[kind], states[kind], batch, steps)
            if turn:
                seconds[kind].append(elapsed / steps)
    jax.tree.map(np.testing.assert_array_equal, states["skipping"].params, states["plain"].params)
    ratios = [one / other for one, other in zip(*(seconds[kind] for kind in KINDS), strict=True)]
    print(*circumstance_lines(config), sep="\n")
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(states['plain'].params)):,} parameters, the same to the last bit"
    )
    for kind in KINDS:
        print(f"{kind}: median {statistics.median(seconds[kind]):.4f} s, best {min(seconds[kind]):.4f} s a step")
    quartiles = statistics.quantiles(ratios, n=4)
    print(f"ratio of a round: median {quartiles[1]:.4f}, quartiles {quartiles[0]:.4f} and {quartiles[2]:.4f}")
    print(f"ratio of the best: {min(seconds['skipping']) / min(seconds['plain']):.4f}")


def compare_programs(config: ConfigDict, topology: str) -> None:
    """Prints what each of the compiled programs needs and does."""
    for kind, program in compile_both(config, list(make_topology(topology).devices)).items():
        costs, memory = count_costs(parse(program.as_text())), program.memory_analysis()
        figures = {name: value for name, value in dataclasses.asdict(costs).items() if isinstance(value, int | float)}
        figures["vector_flops"] = program.cost_analysis()["flops"]
        for name in ("argument", "output", "alias", "temp", "generated_code"):
            figures[f"{name}_bytes"] = getattr(memory, f"{name}_size_in_bytes")
        print(kind, json.dumps(figures))


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="GROUP.KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--topology", help="compile for it, and measure nothing")
    flags = parser.parse_intermixed_args()
    if host_memory.computes_on_cpu():
        host_memory.keep_freed_memory()
    config = load(flags.config, flags.overrides)
    validate(config)
    if flags.topology:
        compare_programs(config, flags.topology)
    else:
        compare_times(config, flags.rounds, flags.steps)


if __name__ == "__main__":
    main()
