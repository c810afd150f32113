"""All that a report has found, once: for its page, and as JSON for programs."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from latentjax.reporting import readings
from latentjax.reporting.readings import EqualInference, EqualTraining
from latentjax.reporting.runs import Curve, RunRecord
from latentjax.reporting.settings import Setting, comparable_groups
from latentjax.reporting.statistics import Difference, Estimate, estimate


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the final table.

    Attributes:
      key: in JSON; heading and unit: on the page.
      read: from a run, its curve and the index of the point that counts, to the number; NaN where there is none.
      is_evaluation: whether it needs an evaluation.
    """

    key: str
    heading: str
    unit: str
    read: Callable[[RunRecord, Curve, int], float]
    is_evaluation: bool = False


COLUMNS = (
    Column("held_out_loss", "Held-out loss", "nats per token", lambda run, curve, at: curve.loss[at], True),
    Column("perplexity", "Perplexity", "per token", lambda run, curve, at: math.exp(min(curve.loss[at], 300.0)), True),
    Column("bits_per_byte", "Bits per byte", "of text", lambda run, curve, at: curve.bits_per_byte[at], True),
    Column(
        "parameters", "Parameters", "", lambda run, curve, at: run.cost.layer_parameters + run.cost.table_parameters
    ),
    Column("train_flops", "Training", "FLOPs", lambda run, curve, at: curve.flops[at]),
    Column("decode_flops_per_token", "Decoding", "FLOPs per token", lambda run, curve, at: run.cost.decode_flops),
    Column("cache_bytes_per_token", "Cache", "bytes per token", lambda run, curve, at: run.cost.cache_bytes),
    Column("tokens", "Tokens", "", lambda run, curve, at: curve.tokens[at]),
    Column("step_seconds", "Time in steps", "", lambda run, curve, at: curve.seconds[at]),
    Column(
        "wall_seconds",
        "Wall time",
        "",
        lambda run, curve, at: math.nan if run.wall_seconds is None else run.wall_seconds,
    ),
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting in the final table: an estimate for each of COLUMNS, None where there is no number."""

    setting: Setting
    estimates: tuple[Estimate | None, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """Of a report.

    Attributes:
      settings: in the order of the runs.
      rows: of the final table, in the same order.
      warnings: each a line.
      tolerance: of equal decoding, relatively.
      equal_inference: groups of settings.
      equal_training: a table for each group of settings that may be compared, where it has two settings or more.
    """

    settings: tuple[Setting, ...]
    rows: tuple[Row, ...]
    warnings: tuple[str, ...]
    tolerance: float
    equal_inference: tuple[EqualInference, ...]
    equal_training: tuple[EqualTraining, ...]

    @property
    def runs(self) -> list[RunRecord]:
        """All of them, by setting."""
        return [run for setting in self.settings for run in setting.runs]

    def as_json(self) -> dict[str, Any]:
        """Returns it for a program; a number that is not there is null, and so is the spread of one run."""
        return {
            "settings": [
                {
                    "label": row.setting.label,
                    "runs": [run.path for run in row.setting.runs],
                    "counted": [run.path for run in row.setting.counted],
                    "step": row.setting.final_step,
                    "finished": row.setting.is_finished,
                    **{column.key: _estimate(found) for column, found in zip(COLUMNS, row.estimates, strict=True)},
                }
                for row in self.rows
            ],
            "runs": [
                {
                    "directory": run.path,
                    "setting": setting.label,
                    "data_seed": run.config.data.seed,
                    "train_seed": run.config.train.seed,
                    "step": run.step,
                    "finished": run.is_finished,
                    "devices": run.devices or None,
                    "remarks": list(run.remarks),
                }
                for setting in self.settings
                for run in setting.runs
            ],
            "equal_inference": {
                "tolerance": self.tolerance,
                "groups": [
                    [
                        {
                            "label": each.setting.label,
                            "decode_flops_per_token": each.setting.runs[0].cost.decode_flops,
                            "held_out_loss": _estimate(each.loss),
                            "over_lowest": _difference(each.over_lowest),
                        }
                        for each in found.ranked
                    ]
                    for found in self.equal_inference
                ],
            },
            "equal_training": [
                {
                    "budgets": list(found.budgets),
                    "settings": [
                        {
                            "label": setting.label,
                            "held_out_loss": [_estimate(each.loss) for each in row],
                            "why_none": [each.reason or None for each in row],
                            "at_its_end": [each.is_end for each in row],
                        }
                        for setting, row in zip(found.settings, found.reached, strict=True)
                    ],
                }
                for found in self.equal_training
            ],
            "warnings": list(self.warnings),
        }


def results_of(settings: Sequence[Setting], tolerance: float, budgets: Sequence[float] | None = None) -> Results:
    """Works all of it out.

    Args:
      tolerance: see `readings.equal_inference`; budgets: see `readings.equal_training`.
    """
    groups, warnings = comparable_groups(settings)
    remarks = [f"{run.path}: {remark}." for setting in settings for run in setting.runs for remark in run.remarks]
    tables = [readings.equal_training(group, budgets) for group in groups]
    return Results(
        settings=tuple(settings),
        rows=tuple(_row(setting) for setting in settings),
        warnings=(*warnings, *remarks),
        tolerance=tolerance,
        equal_inference=tuple(found for group in groups for found in readings.equal_inference(group, tolerance)),
        equal_training=tuple(table for table in tables if len(table.settings) > 1),
    )


def _row(setting: Setting) -> Row:
    step = setting.final_step
    points = []
    for run in setting.counted if setting.counted else setting.runs:
        if step is not None:
            points.append((run, run.held_out, run.held_out.steps.tolist().index(step)))
        elif len(run.training):
            points.append((run, run.training, -1))
    return Row(
        setting,
        tuple(
            None if column.is_evaluation and step is None else estimate([column.read(*point) for point in points])
            for column in COLUMNS
        ),
    )


def _estimate(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else {"mean": found.mean, "standard_deviation": found.spread, "n": found.n}


def _difference(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"value": found.value, "standard_deviation": found.spread, "exceeds_it": found.exceeds_spread}
