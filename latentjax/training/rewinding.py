"""Going back from bad numbers: to a checkpoint from before them, and on behind the data on which they came."""

from collections.abc import Sequence

from latentjax.data.skips import Skip, batch_of_step
from latentjax.errors import UserError
from latentjax.training import processes
from latentjax.training.anomalies import Trouble
from latentjax.training.data_position import SKIPS_FILE, write_skips
from latentjax.training.start import Run, load_state

_ADVICE = "lower optimizer.learning_rate, lengthen optimizer.warmup_ratio or lower optimizer.clip_norm"


def rewind(run: Run, trouble: Trouble) -> None:
    """Puts a run back to before the trouble, with the batches up to it stepped over; it has no state at the moment.

    First the decision is written to data_skips.json, then it is carried out: a run that is killed between the two does
    the rest when it starts again (`data_position.remove_abandoned`). All processes come here after the same step.

    Raises:
      UserError: the run is to stop instead: by config, after too many times, or since no checkpoint is old enough.
    """
    train = run.config.train
    target = step_before(trouble, run.checkpoints.steps, run.skips, run.config.checkpoint.every_steps)
    seen = f"stopped after step {trouble.step}, since {trouble.reason}"
    if target is None:
        raise UserError(f"{seen}, and no checkpoint is left from before: raise checkpoint.max_to_keep, and {_ADVICE}")
    first, last = batch_of_step(target, run.skips), batch_of_step(trouble.step, run.skips) - 1
    if train.on_bad_numbers == "stop":
        raise UserError(
            f"{seen}, with train.on_bad_numbers=stop: set it to rewind, which goes back to step {target} and steps "
            f"over batches {first} to {last}, or {_ADVICE}"
        )
    times = sum(skip.step >= target for skip in run.skips)
    if times >= train.max_rewinds:
        raise UserError(
            f"{seen}; going back to step {target} or later did not help {times} times, which is train.max_rewinds: "
            f"{_ADVICE}, or look at batches {first} to {last}"
        )
    run.skips = (*run.skips, Skip(target, last + 1, trouble.step, trouble.reason))
    processes.on_first(lambda: write_skips(run.workdir, run.skips))
    run.checkpoints.delete_after(target)
    notes = load_state(run)
    run.goodput.rewind(notes.get("goodput"))
    processes.say(
        f"step {trouble.step}: {trouble.reason}; went back to step {run.start_step}, and batches {first} to {last} are "
        f"stepped over (see {run.workdir / SKIPS_FILE})"
    )


def step_before(trouble: Trouble, steps: Sequence[int], skips: Sequence[Skip], every_steps: int) -> int | None:
    """Returns the step to go back to: of the newest checkpoint from before the trouble, or 0 for the beginning.

    Where the run went back to that one before, to no avail, it is the one before it, as long as there is one.

    Args:
      steps: of the checkpoints there are.
      every_steps: `checkpoint.every_steps`; the beginning is meant only where no checkpoint can have been lost.

    Returns:
      None if all checkpoints are from after the trouble began.
    """
    before = sorted(step for step in steps if step <= trouble.last_good)
    if trouble.last_good <= every_steps:
        before = sorted({0, *before})
    if not before:
        return None
    tried = {skip.step for skip in skips}
    return next((step for step in reversed(before) if step not in tried), before[0])
