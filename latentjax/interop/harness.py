"""Running tasks of lm-evaluation-harness. Importing this imports the harness, which takes seconds."""

import dataclasses
import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentjax.errors import UserError, brief, shown

try:
    import lm_eval
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise UserError(
        "tasks are run by lm-evaluation-harness, which is not installed: pip install 'latentjax[tasks]'"
    ) from error

from latentjax.interop.lm_eval_adapter import LatentjaxLM

# Of PonderLM-2's table of downstream tasks, each with no and with five examples.
PAPER_TASKS = (
    "lambada_openai",
    "lambada_standard",
    "piqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "sciq",
    "hellaswag",
    "race",
)
PAPER_SHOTS = (0, 5)
_BOOTSTRAPS = 1000  # for the standard errors of metrics that are no means


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What a task gave.

    Attributes:
      num_fewshot: examples before each question.
      num_requests: questions asked.
      metrics: {metric: value}; `errors`: {metric: its standard error}, where there is one.
    """

    task: str
    num_fewshot: int
    num_questions: int
    metrics: dict[str, float]
    errors: dict[str, float]


class Tasks(TaskManager):
    """The harness's tasks, and those of a directory of YAML files; what goes wrong with them is a `UserError`."""

    def __init__(self, names: Sequence[str], directory: str | None, keep: bool = False):
        """Looks the tasks up.

        Args:
          names: of tasks, groups and tags, or `paper`, which stands for PAPER_TASKS.
          directory: of the user's own tasks; None: there are none.
          keep: load their data now, for all runs, which then must have the same number of examples; if not, each run
            loads them anew.

        Raises:
          UserError: a name is not known (the nearest that is, is named), or data that should be kept cannot be loaded.
        """
        if directory is not None and not Path(directory).expanduser().is_dir():
            raise UserError(f"there is no directory {shown(directory, 200)} to take tasks from")
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        super().__init__(include_path=None if directory is None else str(Path(directory).expanduser()))
        self.names = [each for name in names for each in (PAPER_TASKS if name == "paper" else (name,))]
        for name in self.names:
            if name not in self.task_index:
                near = difflib.get_close_matches(name, self.task_index, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "lm-eval ls tasks lists them"
                raise UserError(f"lm-evaluation-harness has no task {shown(name)}: {hint}")
        self._kept = None
        self._kept = self.load(list(self.names)) if keep else None

    def load(self, task_list: Any) -> Any:
        """Loads tasks and their data.

        Raises:
          UserError: that is not possible, for instance without a network.
        """
        if self._kept is not None:
            return self._kept
        try:
            return super().load(task_list)
        except Exception as error:  # of data sets, hubs, YAML and the code of tasks
            offline = " (and this machine is told to stay offline)" if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
            names = ", ".join(map(str, task_list))
            raise UserError(
                f"the tasks {names} or their data cannot be loaded{offline}: {brief(error, 300)}"
            ) from error

    def run(self, model: LatentjaxLM, num_fewshot: int | None, limit: int | None) -> list[TaskResult]:
        """Runs all of them, with so many examples before each question (None: as each task has it).

        Args:
          limit: questions of each task; None: all.

        Raises:
          UserError: a task cannot be loaded, or asks for what is not implemented.
        """
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(self.names),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=self,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            torch_random_seed=None,  # torch need not be there
        )
        return [_result(found, name) for name in found["results"]]


def _result(found: dict[str, Any], name: str) -> TaskResult:
    """One task's part of what the harness returns: its keys are "metric,filter"."""
    metrics, errors = {}, {}
    for key, value in found["results"][name].items():
        metric, comma, filtered = key.partition(",")
        if not comma or isinstance(value, str):
            continue
        metric = metric if filtered == "none" else f"{metric} ({filtered})"
        if "_stderr" in metric:
            errors[metric.replace("_stderr", "")] = float(value)
        else:
            metrics[metric] = float(value)
    shots = found.get("n-shot", {}).get(name, 0)
    count = found.get("n-samples", {}).get(name, {}).get("effective", 0)
    return TaskResult(name, int(shots or 0), int(count), metrics, errors)
