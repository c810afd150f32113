"""What counts as trouble, and what does not."""

import json
import math

import numpy as np
import pytest

from latentjax.config import default
from latentjax.data.skips import Skip, batch_of_step, skips_from_json, skips_to_json
from latentjax.errors import UserError
from latentjax.training.anomalies import Monitor, Trouble
from latentjax.training.data_position import read_skips, remove_abandoned, write_skips
from latentjax.training.rewinding import step_before


def train_config(**changes):
    config = default().train
    config.update(max_skipped_updates=3, spike_threshold=6.0, spike_window=20)
    config.update(changes)
    return config


def noisy_losses(count: int, seed: int = 0) -> list[float]:
    """Falls from 10 towards 3 as losses do, with noise."""
    steps = np.arange(count)
    return (3 + 7 * np.exp(-steps / 30) + 0.05 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_falling_loss_is_no_spike():
    """Nor is a fall all at once; nor any loss at all where the threshold is 0."""
    monitor = Monitor(train_config())
    for step, loss in enumerate([*noisy_losses(500), 0.5, 0.5], 1):
        assert monitor.judge(step, loss) is None
    monitor = Monitor(train_config(spike_threshold=0.0))
    for step, loss in enumerate([*noisy_losses(100), 1e9], 1):
        assert monitor.judge(step, loss) is None


def test_a_spike_is_found_and_does_not_become_the_measure():
    monitor = Monitor(train_config())
    losses = noisy_losses(300)
    for step, loss in enumerate(losses, 1):
        assert monitor.judge(step, loss) is None
    median = np.median(losses[-20:])
    deviation = 1.4826 * np.median(np.abs(np.array(losses[-20:]) - median))
    limit = median + 6 * max(deviation, 0.01 * median)
    assert monitor.judge(301, limit - 1e-6) is None
    for _ in range(30):
        trouble = monitor.judge(302, limit + 0.1)
        assert trouble.last_good == 301 and trouble.step == 302
        assert f"{limit + 0.1:.4f}, above the limit of" in trouble.reason


def test_steady_losses_leave_room():
    """One per cent of the median is a deviation at least."""
    monitor = Monitor(train_config())
    for step in range(1, 21):
        monitor.judge(step, 2.0)
    assert monitor.judge(21, 2.0 + 5.9 * 0.02) is None
    assert monitor.judge(22, 2.0 + 6.1 * 0.02) is not None


def test_nothing_is_a_spike_before_half_of_the_window():
    monitor = Monitor(train_config())
    for step in range(1, 10):
        monitor.judge(step, 2.0)
    assert monitor.judge(10, 50.0) is None
    assert monitor.judge(11, 50.0) is not None


def test_a_run_of_skipped_updates_between_two_logged_steps():
    """Found though it was over by then; two short ones are not one long one."""
    monitor = Monitor(train_config())
    for step, in_a_row in ((3, 1), (4, 2), (6, 1), (7, 2)):
        monitor.skipped(step, in_a_row)
    assert monitor.judge(10, 2.0) is None
    for step, in_a_row in ((12, 1), (13, 2), (14, 3), (16, 1)):
        monitor.skipped(step, in_a_row)
    trouble = monitor.judge(20, 2.0)
    assert (trouble.step, trouble.last_good) == (20, 11)
    assert "3 steps in a row, 12 to 14, were not finite" in trouble.reason
    assert monitor.judge(30, math.nan) is None  # one of them alone is no run


def test_a_restart_goes_on_watching():
    """With what a checkpoint keeps, through JSON, in the middle of a run of skipped updates and of the window."""
    monitor = Monitor(train_config())
    for step, loss in enumerate(noisy_losses(40), 1):
        monitor.judge(step, loss)
    monitor.skipped(41, 1)
    monitor.skipped(42, 2)
    other = Monitor(train_config(), json.loads(json.dumps(monitor.notes())))
    for each in (monitor, other):
        each.skipped(43, 3)
    assert monitor.judge(50, math.nan) == other.judge(50, math.nan) != None  # noqa: E711
    assert monitor.judge(51, 50.0) == other.judge(51, 50.0)
    assert other.judge(51, 50.0).last_good == 40


def test_nothing_is_trouble_if_so_asked():
    monitor = Monitor(train_config(on_bad_numbers="skip"))
    monitor.skipped(9, 9)
    assert monitor.judge(10, 1e9) is None


TROUBLE = Trouble(step=40, last_good=29, reason="")


@pytest.mark.parametrize(
    ("steps", "gone_back_to", "every_steps", "expected"),
    [
        ([10, 20, 30], [], 10, 20),
        ([10, 20, 30], [10], 10, 20),
        ([10, 20], [20], 10, 10),  # it did not help: one further back
        ([10], [20, 10], 10, 10),  # as far as there is one
        ([20, 29, 30], [], 10, 29),
        ([30, 35], [], 10, None),  # all too late, and earlier ones were dropped
        ([], [], 10, None),
        ([], [], 50, 0),  # none was due
        ([35], [], 35, 0),
    ],
)
def test_where_to_go_back_to(steps, gone_back_to, every_steps, expected):
    skips = [Skip(step, 0, 0, "") for step in gone_back_to]
    assert step_before(TROUBLE, steps, skips, every_steps) == expected


def test_the_batch_of_a_step():
    assert [batch_of_step(step, ()) for step in (0, 7)] == [0, 7]
    skips = [Skip(30, 38, 38, "first"), Skip(45, 60, 52, "second")]
    assert [batch_of_step(step, skips) for step in (29, 30, 44, 45, 46)] == [29, 38, 52, 60, 61]
    # A third went back behind both: what they said of later steps does not count any more.
    skips.append(Skip(20, 66, 51, "third"))
    assert [batch_of_step(step, skips) for step in (19, 20, 30, 45)] == [19, 66, 76, 91]
    assert skips_from_json(json.loads(json.dumps(skips_to_json(skips)))) == tuple(skips)


def test_the_list_of_skips_is_kept_whole(tmp_path):
    assert read_skips(tmp_path) == ()
    skips = (Skip(30, 38, 38, "a \u2581 reason"),)
    write_skips(tmp_path, skips)
    assert read_skips(tmp_path) == skips and [path.name for path in tmp_path.iterdir()] == ["data_skips.json"]
    for damaged in ("", "[", "[{}]", '{"step": 1}', "[1]", '[{"step": null, "batch": 1, "seen_at": 1, "reason": ""}]'):
        (tmp_path / "data_skips.json").write_text(damaged)
        with pytest.raises(UserError, match=r"cannot read .*data_skips\.json") as error:
            read_skips(tmp_path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot write"):
        write_skips(tmp_path / "gone", skips)


class Kept:
    """Stands for checkpoints: by step, how many skips each knows."""

    def __init__(self, known: dict[int, int]):
        self.known = known

    @property
    def steps(self):
        return sorted(self.known)

    def notes(self, step):
        return {"data_skips": [None] * self.known[step]} if self.known[step] else {}

    def delete(self, step):
        del self.known[step]


@pytest.mark.parametrize(
    ("known", "left"),
    [
        ({20: 0, 30: 0, 35: 0}, [20, 30]),  # killed before any was removed
        ({30: 0, 35: 1, 40: 1}, [30, 35, 40]),  # long after
        ({30: 0, 44: 1, 50: 1}, [30, 44, 50]),
    ],
)
def test_checkpoints_gone_back_from_are_removed(known, left):
    checkpoints = Kept(known)
    remove_abandoned(checkpoints, [Skip(30, 38, 38, "")])
    assert checkpoints.steps == left


def test_checkpoints_gone_back_from_twice_are_removed():
    """30 knows of no skip and came before both; 45 knew of the first and is behind the second."""
    checkpoints = Kept({28: 0, 29: 0, 40: 1, 45: 1, 48: 2})
    remove_abandoned(checkpoints, [Skip(30, 38, 38, ""), Skip(40, 60, 50, "")])
    assert checkpoints.steps == [28, 29, 40, 48]
    checkpoints = Kept({25: 0, 29: 0, 40: 1, 48: 2})
    remove_abandoned(checkpoints, [Skip(30, 38, 38, ""), Skip(25, 60, 50, "")])
    assert checkpoints.steps == [25, 48]
