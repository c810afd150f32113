"""The account of a run's wall time, by a clock that the tests turn."""

import json

import pytest

from latentjax.training.goodput import GOODPUT_FILE, PARTS, Goodput


class Clock:
    """Seconds, the same for both kinds of clock but for an offset."""

    def __init__(self, seconds: float = 1000.0):
        self.seconds = seconds

    def goodput(self) -> Goodput:
        return Goodput(lambda: self.seconds - 900, lambda: self.seconds)

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


def seconds_of(goodput: Goodput) -> dict[str, float]:
    return {part: seconds for part, seconds in goodput.to_json()["seconds"].items() if seconds}


def started(clock: Clock, workdir, checkpoint=None) -> Goodput:
    """A start: 3 s until the state is there, 7 s of compiling."""
    goodput = clock.goodput()
    clock.wait(3)
    goodput.take_up(workdir, checkpoint)
    goodput.book("start")
    clock.wait(7)
    goodput.book("compile")
    return goodput


def test_all_time_is_booked_once(tmp_path):
    clock = Clock()
    goodput = started(clock, tmp_path)
    clock.wait(50)
    with goodput.part("evaluation"):
        clock.wait(5)
    clock.wait(20)
    with goodput.part("sampling"):
        clock.wait(2)
    with goodput.part("saving"):
        clock.wait(13)
    assert seconds_of(goodput) == {
        "start": 3, "compile": 7, "steps": 70, "evaluation": 5, "sampling": 2, "saving": 13
    }  # fmt: skip
    assert goodput.wall_seconds == 100 == clock.seconds - 1000
    assert goodput.summary()["share"] == 0.7
    assert goodput.summary()["downtime_seconds"] == 0
    assert goodput.line() == (
        "goodput 70.0% of 100.0 s: steps 70.0 s, start 3.0 s, compile 7.0 s, evaluation 5.0 s, saving 13.0 s, "
        "sampling 2.0 s"
    )


def test_steps_behind_the_last_checkpoint_are_lost_by_a_kill(tmp_path):
    clock = Clock()
    goodput = started(clock, tmp_path)
    clock.wait(40)
    with goodput.part("saving"):
        checkpoint = json.loads(json.dumps(goodput.to_json()))  # 40 s of steps
        clock.wait(1)
    clock.wait(25)
    goodput.book("steps")
    goodput.write(tmp_path)
    clock.wait(4)
    goodput.book("steps")
    goodput.write(tmp_path)  # too soon: what is known of the killed start ends before these 4 s
    clock.wait(30)

    goodput = started(clock, tmp_path, checkpoint)
    assert seconds_of(goodput) == {"start": 6, "compile": 14, "steps": 40, "saving": 1, "redone": 25}
    assert goodput.downtime == 4 + 30 and goodput.starts == 2
    clock.wait(25)
    goodput.book("steps")
    assert goodput.summary()["share"] == round(65 / 111, 4)
    assert goodput.line().endswith("; 2 starts, 34.0 s between them")


def test_a_stop_with_everything_saved_loses_nothing(tmp_path):
    clock = Clock()
    goodput = started(clock, tmp_path)
    clock.wait(40)
    with goodput.part("saving"):
        checkpoint = goodput.to_json()
        clock.wait(1)
    goodput.write(tmp_path, at_once=True)
    clock.wait(600)
    goodput = started(clock, tmp_path, checkpoint)
    assert seconds_of(goodput) == {"start": 6, "compile": 14, "steps": 40, "saving": 1}
    assert goodput.downtime == 600


def test_killed_before_the_first_checkpoint_and_again(tmp_path):
    clock = Clock()
    for start in (1, 2, 3):
        goodput = started(clock, tmp_path)
        assert goodput.starts == start
        clock.wait(9)
        goodput.book("steps")
        goodput.write(tmp_path)
        clock.wait(100)
    assert seconds_of(started(clock, tmp_path)) == {"start": 12, "compile": 28, "redone": 27}


def test_a_checkpoint_newer_than_the_file(tmp_path):
    """The file is written every few seconds; killed just after a save, the checkpoint knows more."""
    clock = Clock()
    goodput = started(clock, tmp_path)
    clock.wait(10)
    goodput.book("steps")
    goodput.write(tmp_path)
    with goodput.part("evaluation"):
        clock.wait(2)
    clock.wait(1)
    goodput.book("steps")
    checkpoint = goodput.to_json()
    clock.wait(50)
    goodput = started(clock, tmp_path, checkpoint)
    assert seconds_of(goodput) == {"start": 6, "compile": 14, "steps": 11, "evaluation": 2}
    assert goodput.downtime == 50


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"seconds": {}}', '{"seconds": {"steps": 1}, "time": "x"}', "null"])
def test_a_damaged_file_costs_only_what_the_checkpoint_does_not_know(tmp_path, damage):
    (tmp_path / GOODPUT_FILE).write_text(damage)
    clock = Clock()
    assert seconds_of(started(clock, tmp_path)) == {"start": 3, "compile": 7}
    checkpoint = {"seconds": dict.fromkeys(PARTS, 1.0), "downtime": 2.0, "starts": 3, "time": clock.seconds - 5}
    goodput = started(clock, tmp_path, checkpoint)
    assert goodput.starts == 4 and goodput.downtime == 2 + 5
    assert goodput.wall_seconds == len(PARTS) + 10


def test_a_rewind_takes_steps_back(tmp_path):
    clock = Clock()
    goodput = started(clock, tmp_path)
    clock.wait(40)
    goodput.book("steps")
    checkpoint = goodput.to_json()
    clock.wait(15)
    goodput.book("steps")
    clock.wait(2)  # reading the checkpoint
    goodput.rewind(checkpoint)
    assert seconds_of(goodput) == {"start": 3, "compile": 7, "steps": 40, "rewound": 17}
    goodput.rewind(None)
    assert seconds_of(goodput) == {"start": 3, "compile": 7, "rewound": 57}
