"""Means, spreads, interpolation, and what is read from them; all against numbers worked out by hand."""

import math

import numpy as np
import pytest
from made_runs import STEPS, made_config, made_run

from latentjax.reporting import readings
from latentjax.reporting.numbers import decimals_for, digits, duration, scaled, signed
from latentjax.reporting.runs import read_run
from latentjax.reporting.settings import group
from latentjax.reporting.statistics import Estimate, difference, estimate, interpolate_log, smoothed


def test_estimates():
    assert estimate([1.0, 2.0, 3.0]) == Estimate(2.0, 1.0, 3)
    assert estimate([4.0, math.nan]) == Estimate(4.0, None, 1)
    assert estimate([math.inf]) is None and estimate([]) is None


def test_differences():
    """Next to the spread of one run of each; without two runs of both there is none."""
    found = difference(Estimate(2.0, 0.3, 2), Estimate(1.4, 0.4, 3))
    assert found.value == pytest.approx(0.6) and found.spread == pytest.approx(0.5) and found.exceeds_spread is True
    assert difference(Estimate(1.8, 0.3, 2), Estimate(1.4, 0.4, 3)).exceeds_spread is False
    assert difference(Estimate(1.8, None, 1), Estimate(1.4, 0.4, 3)).exceeds_spread is None


def test_interpolation():
    x_n, y_n = np.array([1e3, 1e5, 1e6]), np.array([4.0, 2.0, 1.5])
    assert interpolate_log(1e4, x_n, y_n) == pytest.approx(3.0)  # half of the way in log x
    assert interpolate_log(1e3, x_n, y_n) == 4.0 and interpolate_log(1e6, x_n, y_n) == 1.5
    assert interpolate_log(999, x_n, y_n) is None and interpolate_log(1.01e6, x_n, y_n) is None
    assert interpolate_log(1.0, np.zeros(0), np.zeros(0)) is None


def test_smoothing():
    """Keeps a constant and a line away from the ends; passes over what is missing; halves noise at least."""
    line_n = np.arange(50.0)
    np.testing.assert_allclose(smoothed(line_n, 2.0)[10:40], line_n[10:40])
    np.testing.assert_allclose(smoothed(np.full(9, 3.0), 4.0), 3.0)
    holed = smoothed(np.array([1.0, math.nan, 1.0]), 1.0)
    assert holed[0] == holed[2] == 1.0 and math.isnan(holed[1])
    noise_n = np.random.default_rng(0).standard_normal(400)
    assert smoothed(noise_n, 3.0).std() < 0.5


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.012345, "0.0123"), (1.2345, "1.23"), (12.345, "12.3"), (123.45, "123"), (12345.6, "12,346"), (0.0, "0")],
)
def test_digits(value, expected):
    assert digits(value) == expected


def test_other_numbers():
    assert scaled(2.134e13) == "21.3\N{NARROW NO-BREAK SPACE}T" and scaled(999.0) == "999\N{NARROW NO-BREAK SPACE}"
    assert signed(-0.125, 2) == "\N{MINUS SIGN}0.12" and signed(0.5, 1) == "+0.5"
    assert decimals_for([0.0123, 0.5]) == 3 and decimals_for([None]) == 3 and decimals_for([1e-9]) == 4
    said = [duration(each).replace("\N{NARROW NO-BREAK SPACE}", " ") for each in (0.25, 41, 725, 7200, 12000, 187200)]
    assert said == ["0.25 s", "41 s", "12 min 5 s", "2 h", "3 h 20 min", "2 d 4 h"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Vanilla, vanilla of twice the layers, and one thought; of the last a single run."""
    place, runs = tmp_path_factory.mktemp("runs"), []
    for name, method, layers, ends in (
        ("vanilla", "vanilla", 2, (2.40, 2.44)),
        ("deep", "vanilla", 4, (2.20, 2.30)),
        ("loop", "loop", 2, (2.31, 2.33)),
        ("latent", "latent", 2, (2.0,)),
    ):
        for seed, end in enumerate(ends):
            config = made_config(
                method, train__seed=seed, model__num_layers=layers, recurrence__train_jacobi_iterations=(2,)
            )
            evaluations = {10: end + 1.0, 20: end + 0.5, 30: end + 0.25, STEPS: end}
            iterations = dict.fromkeys(range(1, STEPS + 1), 2) if method == "latent" else None
            runs.append(read_run(str(made_run(place / f"{name}{seed}", config, evaluations, iterations=iterations))))
    return group(runs)


def test_equal_inference(settings):
    """Twice the layers, a loop and a thought decode at about the same cost; of a single run no spread is claimed."""
    found = readings.equal_inference(settings, 0.2)
    assert len(found) == 1
    assert [each.setting.label for each in found[0].ranked] == ["latent, C = 1", "vanilla, 4 layers", "loop"]
    lowest, deep, loop = found[0].ranked
    assert lowest.over_lowest is None
    assert deep.over_lowest.value == pytest.approx(0.25) and deep.over_lowest.spread is None
    sentence = " ".join(found[0].sentences(2))
    assert "latent, C = 1 has the lowest held-out loss, 2.00" in sentence
    assert "vanilla, 4 layers by 0.25; loop by 0.32 (each time: spread not known)." in sentence
    # A closer look leaves the thought out, whose attention is to more slots.
    costs = [each.runs[0].cost.decode_flops for each in settings]
    assert costs[1] == pytest.approx(costs[2]) and costs[1] < costs[3]
    (pair,) = readings.equal_inference(settings, 0.001)
    assert [each.setting.label for each in pair.ranked] == ["vanilla, 4 layers", "loop"]
    gap = pair.ranked[1].over_lowest
    assert gap.value == pytest.approx(0.07) and gap.spread == pytest.approx(math.hypot(0.05 * 2**0.5, 0.01 * 2**0.5))
    assert "loop by 0.07 (within the spread)" in " ".join(pair.sentences(2))
    assert loop.loss.n == 2 and pair.cheapest == min(costs[1:3])


def test_equal_training(settings):
    """At what each setting took in all; latent, which took most, is read off in the middle of its curve."""
    found = readings.equal_training(settings)
    per_step = [each.runs[0].training.flops[0] for each in settings]
    # Twice the layers and the loop cost the same: one budget.
    assert found.budgets == pytest.approx([per_step[0] * STEPS, per_step[1] * STEPS, per_step[3] * STEPS])
    vanilla, deep, _, latent = found.reached
    assert vanilla[0].is_end and vanilla[0].loss.mean == pytest.approx(2.42)
    assert vanilla[1].reason == vanilla[2].reason == readings.NOT_REACHED and vanilla[1].loss is None
    assert deep[1].is_end and not deep[0].is_end and deep[2].reason == readings.NOT_REACHED
    # Elsewhere: between two evaluations, on a line in the log of FLOPs.
    for place, column, end in ((1, 0, 2.25), (3, 0, 2.0), (3, 1, 2.0)):
        at = found.budgets[column] / per_step[place]  # in steps
        cell, by_step = found.reached[place][column], {10: end + 1.0, 20: end + 0.5, 30: end + 0.25, 40: end}
        if at < 10:
            assert cell.loss is None and cell.reason == readings.TOO_EARLY
            continue
        lower = int(10 * (at // 10))
        share = math.log(at / lower) / math.log((lower + 10) / lower)
        assert cell.loss.mean == pytest.approx(by_step[lower] + share * (by_step[lower + 10] - by_step[lower]))
        assert not cell.is_end
    assert deep[0].loss.n == 2 and deep[0].loss.spread == pytest.approx(0.05 * 2**0.5)
    assert latent[2].is_end and latent[2].loss.mean == 2.0
    early = readings.equal_training(settings, [per_step[0]])
    assert {row[0].reason for row in early.reached} == {readings.TOO_EARLY}
    first, second = found.sentences(2)  # the last budget was reached by one alone
    assert "vanilla has the lowest held-out loss, 2.42" in first and "more than the spread" in first
    assert second.startswith(f"After {scaled(found.budgets[1])}FLOPs, vanilla, 4 layers has the lowest")


def test_budgets_of_the_user(settings):
    flops = settings[0].runs[0].held_out.flops
    found = readings.equal_training(settings[:1], [float(flops[1]), float((flops[1] * flops[2]) ** 0.5), 1e30])
    assert [each.loss and round(each.loss.mean, 6) for each in found.reached[0]] == [2.92, 2.795, None]
    assert found.sentences(2) == []
