"""The draw of R: a pure function that no version may change, or resumed runs would part from themselves."""

from collections import Counter

import pytest

from latentjax.recurrence.draw import draw_jacobi_iterations

GOLDEN_234 = [4, 2, 4, 3, 2, 4, 2, 3, 2, 4, 4, 4, 2, 2, 3, 2, 4, 3, 2, 4]
GOLDEN_23 = [2, 2, 3, 3, 2, 3, 2, 3, 2, 3, 3, 3, 2, 2, 2, 3, 3, 3, 3, 2]


def test_golden_draws():
    """Seed 0, steps 0 .. 19."""
    assert [draw_jacobi_iterations((2, 3, 4), 0, step) for step in range(20)] == GOLDEN_234
    assert [draw_jacobi_iterations((2, 3), 0, step) for step in range(20)] == GOLDEN_23


def test_pure():
    """Neither the order of the calls nor calls in between change a draw."""
    forward = [draw_jacobi_iterations((2, 3, 4), 7, step) for step in range(50)]
    backward = [draw_jacobi_iterations((2, 3, 4), 7, step) for step in reversed(range(50))]
    assert forward == backward[::-1]


@pytest.mark.parametrize("choices", [(2, 3, 4), (2, 3), (5, 1, 3, 0)])
def test_uniform(choices):
    """Each choice comes up as often as the others, within 4 standard deviations; so do pairs of neighbouring steps."""
    draws = [draw_jacobi_iterations(choices, 3, step) for step in range(3000)]
    for items, share in ((draws, 1 / len(choices)), (list(zip(draws[::2], draws[1::2])), 1 / len(choices) ** 2)):
        counts = Counter(items)
        assert len(counts) == round(1 / share)
        margin = 4 * (len(items) * share * (1 - share)) ** 0.5
        assert all(abs(count - len(items) * share) < margin for count in counts.values())


def test_seed_and_step_are_told_apart():
    """(seed 1, step 2) is not (seed 2, step 1), and seeds differ."""
    by_seed = [tuple(draw_jacobi_iterations((2, 3, 4), seed, step) for step in range(40)) for seed in range(20)]
    assert len(set(by_seed)) == 20
    table = [[draw_jacobi_iterations(range(1000), seed, step) for step in range(10)] for seed in range(10)]
    assert sum(table[i][j] == table[j][i] for i in range(10) for j in range(i)) <= 2


def test_returns_a_python_int_of_the_choices():
    """So that it can be a static argument."""
    assert type(draw_jacobi_iterations((2,), 0, 0)) is int
    assert draw_jacobi_iterations((4,), 123, 456) == 4
