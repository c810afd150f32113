"""What `bench checkpoint` concludes from the times."""

import pytest

from latentjax.training.checkpoint_benchmark import SavingTimes


def test_the_median_of_the_rounds_counts():
    """A round that was slow for both counts like any other."""
    times = SavingTimes(50, 100, 10**9, (1.0, 10.0, 1.0), (1.04, 10.3, 2.0), (0.02, 0.1, 0.3), (0.5, 0.6, 0.7))
    assert times.ratio == pytest.approx(1 / 1.04)
    assert times.holds
    assert times.lines()[0] == "state 1.000 GB, saved every 50 steps"
    assert times.lines()[-1] == "median: saving keeps 0.962 of the throughput, within 5%; it blocks for 0.100 s"
    slow = SavingTimes(50, 100, 10**9, (1.0,), (1.06,), (0.02,), (0.5,))
    assert not slow.holds
    assert "NOT within 5%" in slow.lines()[-1]
