"""Running tasks along the way: what the train verb hands to the training room."""

import sys
from typing import Any

from ml_collections import ConfigDict

from latentjax.errors import UserError
from latentjax.interop.harness import Tasks
from latentjax.interop.harness_text import RunText
from latentjax.interop.lm_eval_adapter import LatentjaxLM, silent_stage


class TaskSchedule:
    """Runs `train.eval_tasks` on the parameters of a step."""

    def __init__(self, train: ConfigDict, shows: bool):
        """Loads the tasks with their data, so that training never waits for a network.

        Args:
          train: the `train` group of a config.
          shows: whether this process speaks.

        Raises:
          UserError: the harness is not installed, a task is not known, or its data cannot be loaded.
        """
        self._tasks = Tasks(train.eval_tasks, train.eval_tasks_path or None, keep=True)
        self._num_fewshot, self._limit, self._shows = (
            train.eval_tasks_num_fewshot,
            train.eval_tasks_limit or None,
            shows,
        )

    def __call__(self, scorer: Any, tokenizer: Any) -> dict[str, float]:
        """Returns {task/NAME/METRIC: value}; {} where a task cannot be run, which is no reason to end training.

        Args:
          scorer: see `HarnessScorer`; tokenizer: of the room `data`.
        """
        adapter = LatentjaxLM(scorer, RunText(tokenizer), silent_stage)
        try:
            results = self._tasks.run(adapter, self._num_fewshot, self._limit)
        except UserError as error:
            if self._shows:
                print(f"tasks were not run: {error}", file=sys.stderr, flush=True)
            return {}
        return {f"task/{each.task}/{metric}": value for each in results for metric, value in each.metrics.items()}
