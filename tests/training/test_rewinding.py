"""Going back from bad numbers: what is trained on after, and that kills change nothing of it."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import recipes
from bad_batches import BAD, BAD_BEHIND_FIRST, FIRST, NUM_STEPS, TAKEN, Batches, config_of
from together import run_together

from latentjax.data.skips import Skip
from latentjax.errors import UserError
from latentjax.training import data_position, loop, rewinding, start
from latentjax.training.checkpoint import RUN, Checkpoints
from latentjax.training.metrics import read_metrics
from latentjax.training.signals import StopRequest


class Killed(BaseException):
    """Ends a run as a kill does: nothing is caught, nothing saved."""


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def strict_lines(workdir: Path) -> list[dict]:
    """metrics.jsonl, read by a parser that takes nothing but JSON."""

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_every_skipped_step_has_a_line_though_few_steps_are_logged(monkeypatch, tmp_path, capsys):
    """Also those just before a stop, which no logged step follows in that start."""
    Batches(monkeypatch, bad={2, 3, 13, 23})

    class StopAfter14(StopRequest):
        looks = 0

        @property
        def requested(self):
            self.looks += 1
            return self.looks > 14

    assert loop.train(config_of(100), tmp_path, StopAfter14()) is None
    assert saved_steps(tmp_path)[-1] == 14
    assert [line["step"] for line in strict_lines(tmp_path)] == [3, 4, 12, 14]
    summary = loop.train(config_of(100), tmp_path, StopRequest())
    lines = strict_lines(tmp_path)
    assert [line["step"] for line in lines] == [3, 4, 12, 14, 24, 27]
    assert [line["skipped_update"] for line in lines] == [1, 1, 0, 1, 1, 0]
    assert [line["skipped_updates"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert [line["loss"] is None for line in lines] == [True, True, False, True, True, False]
    assert summary["skipped_updates"] == 4 and summary["rewinds"] == []
    assert "step 14: update skipped, since the loss (nan)" in capsys.readouterr().err


@pytest.fixture(scope="module")
def rewound(tmp_path_factory) -> tuple[Path, Batches]:
    """A run that three skipped updates in a row send back, on eight devices, and what it trained on."""
    workdir = tmp_path_factory.mktemp("runs") / "rewound"
    with pytest.MonkeyPatch.context() as monkeypatch:
        batches = Batches(monkeypatch, bad=BAD)
        loop.train(config_of(), workdir, StopRequest())
    return workdir, batches


def test_the_run_reads_on_behind_the_trouble(rewound):
    workdir, batches = rewound
    first, second = batches.taken
    assert first[:24] == list(range(24))
    assert second == list(range(24, 24 + NUM_STEPS - 12))  # from step 12 on, and no batch twice
    (skip,) = json.loads((workdir / "data_skips.json").read_text())
    assert (skip["step"], skip["batch"], skip["seen_at"]) == (12, 24, 24)
    assert skip["reason"] == "the loss or the gradients of 3 steps in a row, 14 to 16, were not finite"
    lines = strict_lines(workdir)
    assert [line["step"] for line in lines] == [12, 24, 27]
    assert [line["skipped_updates"] for line in lines] == [0, 0, 0]
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["rewinds"] == [skip] and summary["goodput"]["seconds"]["rewound"] > 0
    notes = ocp.JsonCheckpointHandler().restore(workdir / "checkpoints" / str(NUM_STEPS) / RUN)
    assert notes["data_position"]["sequences"] == (24 + NUM_STEPS - 12) * 8 and notes["data_skips"] == [skip]


@pytest.mark.long
def test_two_processes_go_back_together(monkeypatch, tmp_path):
    """Though only one of them has bad numbers: both at the same step, and on with the numbers of one process.

    They have stepped over something before, which only the first finds in its directory.
    """
    first = Skip(0, FIRST, FIRST, "as if the first steps had been bad")
    for workdir in (tmp_path / "one", tmp_path / "two" / "0"):
        workdir.mkdir(parents=True)
        data_position.write_skips(workdir, (first,))
    batches = Batches(monkeypatch, BAD_BEHIND_FIRST)
    loop.train(config_of(), tmp_path / "one", StopRequest())
    assert batches.taken[0][:24] == list(range(3, 27)) and batches.taken[1] == list(range(27, 27 + NUM_STEPS - 12))

    place = f"checkpoint.directory={tmp_path}/two/checkpoints"
    recipe = str(Path(__file__).parent / "bad_batches.py")
    for result in run_together(tmp_path / "two", "mesh.data=8", place, recipe=recipe, apart=True):
        assert result.returncode == 0, result.stdout + result.stderr
        (line,) = [line for line in result.stderr.splitlines() if line.startswith(TAKEN)]
        before, after = json.loads(line.removeprefix(TAKEN))
        assert before[:24] == batches.taken[0][:24] and after == batches.taken[1]
    ours, theirs = tmp_path / "two" / "0", tmp_path / "one"
    assert (ours / "data_skips.json").read_text() == (theirs / "data_skips.json").read_text()
    assert len(data_position.read_skips(ours)) == 2
    log, whole = recipes.comparable_metrics(ours), recipes.comparable_metrics(theirs)
    assert [line.keys() for line in log] == [line.keys() for line in whole]
    for key in whole[0]:
        np.testing.assert_allclose([line[key] for line in log], [line[key] for line in whole], atol=1e-5, err_msg=key)
    assert saved_steps(tmp_path / "two") == saved_steps(theirs)


def fail(*_: object, **__: object):
    raise Killed


def killed_after(module, name: str, monkeypatch):
    real = getattr(module, name)

    def action(*arguments, **options):
        real(*arguments, **options)
        raise Killed

    monkeypatch.setattr(module, name, action)


KILLS = {
    "before the decision": lambda patch: patch.setattr(rewinding, "write_skips", fail),
    "after the decision": lambda patch: killed_after(rewinding, "write_skips", patch),
    "after a removal": lambda patch: killed_after(Checkpoints, "delete", patch),
    "while going back": lambda patch: patch.setattr(rewinding, "load_state", fail),
    "after going back": lambda patch: killed_after(rewinding, "load_state", patch),
}


@pytest.mark.parametrize(
    "moment", [pytest.param(name, marks=[pytest.mark.long] if "going back" in name else []) for name in KILLS]
)
def test_a_kill_anywhere_changes_nothing(rewound, monkeypatch, tmp_path, moment):
    expected, _ = rewound
    batches = Batches(monkeypatch, bad=BAD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        KILLS[moment](patch)
        loop.train(config_of(), tmp_path, StopRequest())
    loop.train(config_of(), tmp_path, StopRequest())
    assert batches.taken[-1] == list(range(24, 24 + NUM_STEPS - 12))
    assert recipes.comparable_metrics(tmp_path) == recipes.comparable_metrics(expected)
    for one, other in zip(recipes.final_arrays(tmp_path), recipes.final_arrays(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert saved_steps(tmp_path) == saved_steps(expected)


def test_a_kill_before_the_next_checkpoint_and_other_devices(rewound, monkeypatch, tmp_path):
    """It goes on with one device in place of eight: the same batches, and losses as near as sums in another order."""
    batches = Batches(monkeypatch, bad=BAD)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        real = Checkpoints.save

        def save(self, state, step, run):
            if run["data_skips"]:
                raise Killed
            real(self, state, step, run)

        patch.setattr(Checkpoints, "save", save)
        loop.train(config_of(), tmp_path, StopRequest())
    real_mesh = start.make_mesh
    monkeypatch.setattr(start, "make_mesh", lambda config, devices: real_mesh(config, jax.devices()[:1]))
    loop.train(config_of(), tmp_path, StopRequest())
    assert batches.taken[-1] == list(range(24, 24 + NUM_STEPS - 12))
    ours, whole = read_metrics(tmp_path / "metrics.jsonl"), read_metrics(rewound[0] / "metrics.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    np.testing.assert_allclose([line["loss"] for line in ours], [line["loss"] for line in whole], atol=1e-5)
    # Even without the file: the newest checkpoint has the list.
    (tmp_path / data_position.SKIPS_FILE).unlink()
    loop.train(config_of(num_steps=NUM_STEPS + 1), tmp_path, StopRequest())
    assert batches.taken[-1] == [24 + NUM_STEPS - 12]


def test_where_going_back_does_not_help_the_run_stops_with_a_line(monkeypatch, tmp_path, capsys):
    batches = Batches(monkeypatch, bad=range(13, 1000))
    with pytest.raises(UserError) as error:
        loop.train(config_of(max_rewinds=2), tmp_path, StopRequest())
    message = str(error.value)
    assert "\n" not in message
    assert re.search(
        r"stopped after step 12, since .* did not help 2 times, which is train.max_rewinds: lower", message
    )
    assert len(batches.taken) == 3
    # The second time it went one checkpoint further back, and for good: the first one may have been the trouble.
    skips = json.loads((tmp_path / "data_skips.json").read_text())
    assert [(skip["step"], skip["batch"]) for skip in skips] == [(12, 24), (8, 36)]
    assert [taken[0] for taken in batches.taken] == [0, 24, 36]
    assert "went back to step 12, and batches 12 to 23 are stepped over" in capsys.readouterr().out


def test_it_stops_at_once_if_asked_to(monkeypatch, tmp_path):
    Batches(monkeypatch, bad=BAD)
    with pytest.raises(UserError, match="after step 24, .*goes back to step 12 and steps over batches 12 to 23"):
        loop.train(config_of(on_bad_numbers="stop"), tmp_path, StopRequest())
    assert not (tmp_path / "data_skips.json").exists()


def test_it_goes_on_if_asked_to(monkeypatch, tmp_path):
    batches = Batches(monkeypatch, bad=BAD)
    summary = loop.train(config_of(100, on_bad_numbers="skip", num_steps=17), tmp_path, StopRequest())
    assert batches.taken == [list(range(17))] and summary["skipped_updates"] == 3


def test_a_spike_sends_back_to_before_it(monkeypatch, tmp_path):
    """Of tokens that no text has."""

    def spoil(batch):
        batch["tokens"][:] = np.arange(batch["tokens"].size).reshape(batch["tokens"].shape) % 5

    batches = Batches(monkeypatch, bad={19}, spoil=spoil)
    spike = {"spike_threshold": 8.0, "spike_window": 10, "log_every_steps": 1}
    loop.train(config_of(8, num_steps=22, **spike), tmp_path, StopRequest())
    (skip,) = json.loads((tmp_path / "data_skips.json").read_text())
    assert (skip["step"], skip["batch"], skip["seen_at"]) == (16, 20, 20)
    assert "above the limit" in skip["reason"]
    assert [taken[0] for taken in batches.taken] == [0, 20]
    assert [line["step"] for line in strict_lines(tmp_path)] == list(range(1, 23))


def test_from_the_first_step_on_it_begins_anew(monkeypatch, tmp_path):
    """There is no checkpoint to go back to, and none was lost."""
    batches = Batches(monkeypatch, bad={0, 1, 2})
    summary = loop.train(config_of(log_every_steps=3, num_steps=6), tmp_path, StopRequest())
    assert batches.taken[-1] == list(range(3, 9))
    assert [skip["step"] for skip in summary["rewinds"]] == [0]
