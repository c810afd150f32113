"""What the numbers say, and no more: settings that cost as much in decoding, and settings after as much training."""

import dataclasses
from collections.abc import Sequence

from latentjax.reporting.numbers import scaled, written
from latentjax.reporting.settings import Setting
from latentjax.reporting.statistics import Difference, Estimate, difference, estimate, interpolate_log

NOT_REACHED = "not reached"
TOO_EARLY = "before its first evaluation"
_MOST_BUDGETS = 5
_SAME_BUDGET = 1.05  # budgets nearer than this are one
_AT_ITS_END = 0.97  # of a run's FLOPs: the seeds of a setting draw different R


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A setting among others.

    Attributes:
      loss: held-out, nats per token.
      over_lowest: how far above the lowest of them; None for the lowest.
    """

    setting: Setting
    loss: Estimate
    over_lowest: Difference | None


@dataclasses.dataclass(frozen=True)
class EqualInference:
    """Settings whose tokens cost about as much to decode, by their final held-out losses, the lowest first."""

    ranked: tuple[Ranked, ...]

    @property
    def cheapest(self) -> float:
        """The smallest number of decoding FLOPs per token among them."""
        return min(each.setting.runs[0].cost.decode_flops for each in self.ranked)

    def sentences(self, decimals: int) -> list[str]:
        """It in words."""
        flops = [each.setting.runs[0].cost.decode_flops for each in self.ranked]
        low, high = scaled(min(flops)), scaled(max(flops))
        about = f"{low}FLOPs" if low == high else f"{low}FLOPs to {high}FLOPs"
        lead = f"At {about} a decoded token, {_ranking(self.ranked, decimals)}"
        behind = []
        if unfinished := [each.setting.label for each in self.ranked if not each.setting.is_finished]:
            behind.append(f"Not at the end of training: {'; '.join(unfinished)}.")
        if len({tokens_of(each.setting) for each in self.ranked}) > 1:
            behind.append("They were not trained on equally many tokens.")
        return [lead, *behind]


def equal_inference(settings: Sequence[Setting], tolerance: float) -> list[EqualInference]:
    """Finds settings that may be compared at equal cost of decoding.

    Args:
      settings: of one comparable group; those without a held-out loss are passed over.
      tolerance: a setting belongs to a group if its decoding FLOPs per token are at most so much, relatively, above
        those of the group's cheapest.

    Returns:
      The groups of two or more, the cheapest first.
    """
    known = [(setting, loss) for setting in settings if (loss := setting.loss) is not None]
    groups: list[list[tuple[Setting, Estimate]]] = []
    for setting, loss in sorted(known, key=lambda pair: _decode_flops(pair[0])):
        if groups and _decode_flops(setting) <= (1 + tolerance) * _decode_flops(groups[-1][0][0]):
            groups[-1].append((setting, loss))
        else:
            groups.append([(setting, loss)])
    return [EqualInference(_rank(group)) for group in groups if len(group) > 1]


@dataclasses.dataclass(frozen=True)
class Reached:
    """What a setting had reached at a budget of training FLOPs.

    Attributes:
      loss: held-out, over the runs that came so far; None: none did, see `reason`.
      reason: NOT_REACHED or TOO_EARLY, else "".
      is_end: whether the budget is all that its runs were planned for: only there the learning rate has decayed.
    """

    loss: Estimate | None
    reason: str
    is_end: bool


@dataclasses.dataclass(frozen=True)
class EqualTraining:
    """Held-out losses after equal training FLOPs: for each setting a row, for each budget a column."""

    budgets: tuple[float, ...]
    settings: tuple[Setting, ...]
    reached: tuple[tuple[Reached, ...], ...]

    def sentences(self, decimals: int) -> list[str]:
        """It in words, a sentence for each budget that two or more settings have reached."""
        found = []
        for column, budget in enumerate(self.budgets):
            cells = [(setting, row[column].loss) for setting, row in zip(self.settings, self.reached, strict=True)]
            ranked = _rank([(setting, loss) for setting, loss in cells if loss is not None])
            if len(ranked) > 1:
                found.append(f"After {scaled(budget)}FLOPs, {_ranking(ranked, decimals)}")
        return found


def equal_training(settings: Sequence[Setting], budgets: Sequence[float] | None = None) -> EqualTraining:
    """Reads off the evaluation curves what each setting had reached by given training FLOPs.

    Args:
      settings: of one comparable group; those that were never evaluated are passed over.
      budgets: in FLOPs; None: what the whole training of each setting took, of five at most.
    """
    known = [setting for setting in settings if any(len(run.held_out) for run in setting.runs if not run.diverged)]
    if budgets is None:
        budgets = _thinned(sorted(map(_final_flops, known)))
    rows = tuple(tuple(_reached(setting, budget) for budget in budgets) for setting in known)
    return EqualTraining(tuple(budgets), tuple(known), rows)


def _reached(setting: Setting, budget: float) -> Reached:
    curves = [run.held_out for run in setting.runs if not run.diverged and len(run.held_out)]
    losses = [interpolate_log(budget, curve.flops, curve.loss) for curve in curves]
    found = estimate([loss for loss in losses if loss is not None])
    if found is None:
        return Reached(None, TOO_EARLY if all(budget < curve.flops[0] for curve in curves) else NOT_REACHED, False)
    return Reached(found, "", setting.is_finished and budget >= _AT_ITS_END * _final_flops(setting))


def _final_flops(setting: Setting) -> float:
    """What the runs of a setting have all reached when they were last evaluated."""
    return min(float(run.held_out.flops[-1]) for run in setting.runs if not run.diverged and len(run.held_out))


def _thinned(budgets: list[float]) -> list[float]:
    """Ascending budgets, none near another; the first, the last, and others evenly between them."""
    apart: list[float] = []
    for budget in budgets:
        if not apart or budget > _SAME_BUDGET * apart[-1]:
            apart.append(budget)
    if len(apart) <= _MOST_BUDGETS:
        return apart
    last = len(apart) - 1
    return [apart[round(place * last / (_MOST_BUDGETS - 1))] for place in range(_MOST_BUDGETS)]


def tokens_of(setting: Setting) -> float:
    """What a setting with a final step was trained on until then."""
    run = setting.counted[0]
    return float(run.held_out.tokens[run.held_out.steps.tolist().index(setting.final_step)])


def _decode_flops(setting: Setting) -> float:
    return setting.runs[0].cost.decode_flops


def _rank(losses: Sequence[tuple[Setting, Estimate]]) -> tuple[Ranked, ...]:
    ordered = sorted(losses, key=lambda pair: pair[1].mean)
    return tuple(
        Ranked(setting, loss, difference(loss, ordered[0][1]) if place else None)
        for place, (setting, loss) in enumerate(ordered)
    )


def _ranking(ranked: Sequence[Ranked], decimals: int) -> str:
    """The end of a sentence: who is lowest, and how far the others are above, next to the spread."""
    lowest, *others = ranked
    gaps = [(each.setting.label, each.over_lowest) for each in others if each.over_lowest is not None]
    verdicts = {verdict(gap) for _, gap in gaps}
    alike = len(gaps) > 1 and len(verdicts) == 1  # said once
    parts = [
        f"{label} by {written(gap.value, decimals)}" + ("" if alike else f" ({verdict(gap)})") for label, gap in gaps
    ]
    behind = f" (each time: {verdicts.pop()})" if alike else ""
    loss = written(lowest.loss.mean, decimals)
    return f"{lowest.setting.label} has the lowest held-out loss, {loss}. Above it: {'; '.join(parts)}{behind}."


def verdict(gap: Difference) -> str:
    """Whether a setting is above the lowest by more than the spread, in a few words."""
    exceeds = gap.exceeds_spread
    if exceeds is None:
        return "spread not known"
    return "more than the spread" if exceeds else "within the spread"
