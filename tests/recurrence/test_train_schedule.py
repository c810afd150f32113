"""Stages of training: which step is of which, how often each C and R comes up, and that nothing else decides it."""

import dataclasses
from collections import Counter

import pytest
from tiny import language_model

from latentjax.recurrence.draw import Stage, TrainSchedule, Work, draw_jacobi_iterations

SPEC = dataclasses.replace(language_model(2).recurrence_spec, train_jacobi_iterations=(2, 3, 4))
STAGES = ((0.0, 0, (0,)), (0.5, 1, (0, 1)), (0.8, 2, (2, 3, 3)))


def schedule(num_steps: int, *, stages: tuple = STAGES, handover: float = 0.0) -> TrainSchedule:
    return TrainSchedule.of(dataclasses.replace(SPEC, train_schedule=stages, handover_ratio=handover), num_steps)


def test_without_stages_it_draws_what_it_always_drew():
    """R from the whole set at every step, with the model's C; nothing where a method does not iterate."""
    plain = TrainSchedule.of(SPEC, 100)
    assert plain.stages == (Stage(0, 100, 0, 2, (2, 3, 4)),) and not plain.varies_thoughts
    assert [plain.draw(7, step) for step in range(100)] == [
        (2, draw_jacobi_iterations((2, 3, 4), 7, step)) for step in range(100)
    ]
    assert plain.works == ((2, 2), (2, 3), (2, 4)) and plain.description == "R = 2, 3, 4"
    assert TrainSchedule.of(dataclasses.replace(SPEC, method="loop"), 100).works == ((2, 0),)


def test_stages_begin_at_their_steps():
    """The nearest step to each share; a stage that no step is left for is none."""
    plan = schedule(1000)
    assert [(stage.begin, stage.end) for stage in plan.stages] == [(0, 500), (500, 800), (800, 1000)]
    thoughts = [plan.draw(3, step).num_latent_thoughts for step in (0, 499, 500, 799, 800, 999)]
    assert thoughts == [0, 0, 1, 1, 2, 2]
    assert {plan.draw(3, step) for step in range(500)} == {(0, 0)}
    assert plan.works == ((0, 0), (1, 0), (1, 1), (2, 2), (2, 3)) and plan.varies_thoughts
    assert [(stage.begin, stage.end, stage.num_latent_thoughts) for stage in schedule(1).stages] == [(0, 1, 1)]
    # 0.57 * 100 is a little less than 57.
    assert schedule(100, stages=((0.0, 0, (0,)), (0.57, 1, (2,)))).stages[1].begin == 57


@pytest.mark.parametrize("handover", [0.0, 0.2])
def test_shares_are_those_of_many_draws(handover: float):
    """The mean that costs are told by, within 5 standard deviations; repeated values of R count as often."""
    plan, seeds = schedule(200, handover=handover), range(100)
    counts = Counter(plan.draw(seed, step) for seed in seeds for step in range(200))
    assert set(counts) == set(plan.works) and sum(plan.shares.values()) == pytest.approx(1)
    for work, share in plan.shares.items():
        deviation = (200 * len(seeds) * share * (1 - share)) ** 0.5
        assert abs(counts[work] - 200 * len(seeds) * share) < 5 * deviation, work
    assert plan.shares[Work(0, 0)] == pytest.approx(0.5 + handover / 2)


def test_a_stage_takes_over_linearly():
    """None of the hand-over's steps at its beginning, half in its middle, all at its end; R is of the drawn stage."""
    plan, seeds = schedule(1000, handover=0.1), range(400)
    for place in (2, 25, 50, 75, 97):
        drawn = [plan.draw(seed, 500 + place) for seed in seeds]
        share = sum(work.num_latent_thoughts == 1 for work in drawn) / len(drawn)
        expected = (place + 0.5) / 100
        assert abs(share - expected) < 5 * (expected * (1 - expected) / len(seeds)) ** 0.5
        assert {work for work in drawn if work.num_latent_thoughts == 0} == {(0, 0)}
    assert {plan.draw(seed, step).num_latent_thoughts for seed in range(9) for step in (499, 600)} == {0, 1}
    assert {plan.draw(seed, 600).num_latent_thoughts for seed in seeds} == {1}


def test_golden_draws_of_a_hand_over():
    """Of seed 0: a pure function that no version may change, or resumed runs would part from themselves."""
    plan = schedule(40, handover=0.2)
    drawn = [plan.draw(0, step) for step in range(40)]
    assert drawn[::-1] == [plan.draw(0, step) for step in reversed(range(40))]
    assert "".join(str(work.num_latent_thoughts) for work in drawn) == "0000000000000000000000011111111111111112"
    assert type(drawn[30].num_jacobi_iterations) is int
