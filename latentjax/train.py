"""`python -m latentjax.train`: trains a recipe, or goes on with a run that was stopped.

python -m latentjax.train --config configs/quickstart.py
python -m latentjax.train --config configs/quickstart.py:vanilla --config.train.num_steps=2000 --workdir runs/mine
python -m latentjax.train --config RECIPE --config.init_from=DIRECTORY
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from latentjax import config as config_lib
from latentjax.command_line import LineParser, add_process_flags, split_overrides
from latentjax.errors import run_verb


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status: 0 done, 128 + n stopped by signal n with everything saved.

    Raises:
      UserError: anything wrong with the flags, the config, the data or the directory.
    """
    parser = LineParser(
        prog="python -m latentjax.train",
        description="Train a recipe; the same command resumes a run that was stopped.",
        epilog="Any knob of latentjax/config.py can be set with --config.GROUP.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="a recipe: configs/NAME.py, or configs/NAME.py:ARGUMENT")
    parser.add_argument("--workdir", type=Path, help="the run's directory (default: runs/NAME, or runs/NAME-ARGUMENT)")
    add_process_flags(parser)
    arguments, overrides = split_overrides(argv)
    flags = parser.parse_args(arguments)
    config = config_lib.load(flags.config, overrides)
    recipe, _, argument = flags.config.partition(":")
    workdir = flags.workdir or Path("runs") / "-".join(filter(None, (Path(recipe).stem, argument)))

    # Here and not above: processes that read data import this module too, and have no use for jax.
    from latentjax.validation import validate

    validate(config)
    initial_params = None
    if config.train.init_from:
        from latentjax.continuing import begin_from

        given = {config_lib.ALIASES.get(key, key) for key in (each.partition("=")[0] for each in overrides)}
        initial_params = begin_from(config, given, workdir)
        validate(config)  # with the model that it begins from
    from latentjax.training import host_memory, processes

    if host_memory.computes_on_cpu():
        host_memory.keep_freed_memory()
    processes.start(flags.coordinator, flags.num_processes, flags.process_id)  # before jax looks for devices
    score_tasks = None
    if config.train.tasks_every_steps:
        # What the training room may not know of; whatever is amiss with it is said before training begins.
        from latentjax.interop.task_schedule import TaskSchedule

        score_tasks = TaskSchedule(config.train, shows=processes.is_first())
    from latentjax.training.last_words import TRAIN
    from latentjax.training.loop import train
    from latentjax.training.signals import StopRequest

    stop = StopRequest()
    with processes.watched(TRAIN, config.train) as watchdog:
        summary = train(config, workdir, stop, watchdog, initial_params, score_tasks)
    if summary is None:
        return stop.exit_status
    if not processes.is_first():
        return 0
    scores = f"loss {summary['loss']:.4f}; "
    if "eval_loss" in summary:
        scores = f"held-out loss {summary['eval_loss']:.4f}, {summary['eval_bits_per_byte']:.4f} bits per byte; "
    print(
        f"done: {summary['steps']:,} steps, {summary['tokens']:,} tokens in {summary['wall_seconds']:,.0f} s; {scores}"
        f"metrics, samples and checkpoints are in {workdir}",
        file=sys.stdout,
    )
    return 0


if __name__ == "__main__":
    run_verb("train", main)
