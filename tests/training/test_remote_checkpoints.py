"""Checkpoints behind gs://, against a stand-in of Google Cloud Storage on this machine."""

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import recipes
from fake_gcs import Bucket, served
from small_checkpoints import faults, flipped, opened, restored, save, state

from latentjax.errors import UserError
from latentjax.training import checkpoint
from latentjax.training import checkpoint_files as files

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("gcsfs"), reason="gcsfs is not installed")

RUN = "gs://bucket/run"
Objects = dict[str, tuple[bytes, int]]


def checkpoint_steps(bucket: Bucket) -> set[str]:
    return {name.split("/")[1] for name in bucket.objects if name.startswith("run/")}


@pytest.fixture(scope="module")
def shared_bucket() -> Iterator[tuple[Bucket, Objects]]:
    """The bucket that gs:// means in this process, and what is in it when steps 3 and 7 have been saved there.

    One for all tests: gcsfs and TensorStore keep the address that they have found first.
    """
    with served() as (bucket, environment), pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        checkpoints, said = opened(RUN)
        for step in (3, 7):
            save(checkpoints, step)
        checkpoints.close()
        assert said == []
        yield bucket, dict(bucket.objects)


@pytest.fixture
def saved(shared_bucket: tuple[Bucket, Objects]) -> Bucket:
    """A bucket with checkpoints 3 and 7."""
    bucket, objects = shared_bucket
    bucket.objects = dict(objects)
    bucket.changes_left, bucket.room, bucket.hidden = None, None, ""
    return bucket


def contents(bucket: Bucket, place: str) -> dict[str, bytes]:
    """What lies there."""
    return {
        name.removeprefix(place): content for name, (content, _) in bucket.objects.items() if name.startswith(place)
    }


def restore_every_fault(bucket: Bucket, flips: int, every: int) -> int:
    """Tries each object of checkpoint 7 with each fault (or every n-th of all); returns how often it was set aside."""
    whole = dict(bucket.objects)
    # In the same order always: some names are drawn by chance.
    names = sorted((name.rpartition("/")[0], bucket.size(name), name) for name in whole if name.startswith("run/7/"))
    assert any("ocdbt" in name for _, _, name in names)
    cases = [(name, fault) for _, _, name in names for fault in faults(whole[name][0], flips)]
    set_aside = 0
    for name, fault in cases[::every]:
        bucket.objects = dict(whole)
        del bucket.objects[name]
        if fault is not None:
            bucket.write(name, fault, None)
        damaged = contents(bucket, "run/7/")
        checkpoints, said = opened(RUN)
        if restored(checkpoints) == 7:  # every number is the one that was saved: the object is not needed
            assert said == [] and contents(bucket, "run/7/") == damaged
        else:
            set_aside += 1
            (line,) = said
            assert line.startswith("checkpoint 7 is damaged (") and "\n" not in line and len(line) < 600
            assert f"moved to {RUN}/damaged/7; going back to step 3" in line
            assert checkpoint_steps(bucket) == {"3", "damaged"}
            assert contents(bucket, "run/damaged/7/") == damaged
        checkpoints.close()
    return set_aside


def test_a_damaged_object_is_noticed_or_does_no_harm(saved: Bucket):
    """Each object with one of seven faults, in turn."""
    assert restore_every_fault(saved, flips=3, every=8) >= 5


@pytest.mark.long
def test_every_object_with_every_fault(saved: Bucket):
    assert restore_every_fault(saved, flips=10, every=1) >= 50


def test_flipped_bits_that_nobody_notices_are_where_nobody_reads(saved: Bucket):
    """Of the largest object of arrays, whose end is an index that has been written again elsewhere."""
    whole = dict(saved.objects)
    name = max((name for name in whole if name.startswith("run/7/state/")), key=saved.size)
    saved.reads.clear()
    assert restored(opened(RUN)[0]) == 7
    spans = [(first, behind) for read, first, behind in saved.reads if read == name]
    edge = max(behind for _, behind in spans)
    assert edge < saved.size(name) - 100
    for place in (0, edge - 1, edge, saved.size(name) - 100):
        saved.objects = dict(whole)
        saved.write(name, flipped(whole[name][0], place, 0), None)
        checkpoints, said = opened(RUN)
        assert (restored(checkpoints), len(said)) == ((3, 1) if place < edge else (7, 0)), (name, place, edge)
        checkpoints.close()


def cut_off_setting_aside(bucket: Bucket, cuts: Iterable[int]) -> None:
    """Refuses all changes behind the first so many, and then starts again: nothing is lost, and the rest is done."""
    whole, directory = dict(bucket.objects), files.directory_of(RUN, None)
    damaged = contents(bucket, "run/7/")
    for cut in cuts:
        bucket.objects, bucket.changes_left = dict(whole), cut
        with pytest.raises(UserError, match="the damaged checkpoint 7 in gs://bucket/run cannot be moved to damaged/"):
            files.set_aside(directory, 7)
        bucket.changes_left = None
        if 7 in files.open_directory(directory):
            files.set_aside(directory, 7)
        assert contents(bucket, "run/damaged/7/") == damaged, cut
        # Cut off just behind the copy, it was found once more.
        assert contents(bucket, "run/damaged/7-2/").items() <= damaged.items(), cut
        assert checkpoint_steps(bucket) == {"3", "damaged"} and files.open_directory(directory) == [3], cut
    bucket.objects = dict(whole)
    assert str(files.set_aside(directory, 7)) == f"{RUN}/damaged/7"
    assert contents(bucket, "run/damaged/7/") == damaged and contents(bucket, "run/7/") == {}


def test_setting_aside_that_is_cut_off(saved: Bucket):
    """Before and in the copying, behind it, and in the deleting."""
    count = len(contents(saved, "run/7/"))
    cut_off_setting_aside(saved, (0, 1, count // 2, count + 1, count + 2, count + 3, count + 4, count + count // 2))


@pytest.mark.long
def test_setting_aside_that_is_cut_off_anywhere(saved: Bucket):
    # One object more is made and deleted while they are copied.
    cut_off_setting_aside(saved, range(2 * len(contents(saved, "run/7/")) + 2))


def test_set_aside_twice(saved: Bucket):
    """A step that was done again, and damaged again."""
    directory, whole = files.directory_of(RUN, None), dict(saved.objects)
    for name in ("7", "7-2", "7-3"):
        assert str(files.set_aside(directory, 7)) == f"{RUN}/damaged/{name}"
        assert files.open_directory(directory) == [3]
        saved.objects |= whole
    assert len(saved.objects) == len(whole) + 3 * len(contents(saved, "run/7/"))
    # Cut off, a copy is made again in its place.
    saved.write("run/damaged/7-2/copying.txt", b"", None)
    assert str(files.set_aside(directory, 7)) == f"{RUN}/damaged/7-2"


def test_a_save_that_is_cut_off(saved: Bucket):
    """It leaves what is no checkpoint, and what the next start deletes."""
    checkpoints, said = opened(RUN)
    saved.changes_left = 9
    save(checkpoints, 9)
    assert not checkpoints.settle()
    saved.changes_left = None
    assert said[-1].startswith(f"saving step 9 to {RUN} failed (") and said[-1].endswith("is that of step 7")
    assert contents(saved, "run/9/") and files.complete_steps(files.directory_of(RUN, None)) == [3, 7]
    assert opened(RUN)[0].steps == [3, 7]
    assert checkpoint_steps(saved) == {"3", "7"}


def test_a_bucket_that_takes_no_more(saved: Bucket, monkeypatch: pytest.MonkeyPatch):
    """What is there stays."""
    monkeypatch.setattr(checkpoint, "_LAST_WAITS", (0.0, 0.0))
    checkpoints, said = opened(RUN)
    saved.room = 0
    with pytest.raises(UserError, match=f"step 9 cannot be saved to {RUN} .*is that of step 7$"):
        checkpoints.save_last(state(9), 9, {"step": 9, "seed": 0.1})
    assert len(said) == 3 and checkpoint_steps(saved) == {"3", "7"}


def test_deleting_that_is_cut_off(saved: Bucket):
    """What is left is whole, or is no checkpoint any more."""
    whole, directory = dict(saved.objects), files.directory_of(RUN, None)
    for cut in (0, 1, 2, 3, 9):
        saved.objects, saved.changes_left = dict(whole), cut
        with pytest.raises(OSError, match="Forbidden"):
            files.delete(directory, 7)
        saved.changes_left = None
        if cut < 2:
            assert files.open_directory(directory) == files.complete_steps(directory) == [3, 7]
            lost = whole.keys() - saved.objects.keys()
            assert lost == (set() if cut == 0 else {"run/7/commit_success.txt"})
        else:
            assert files.complete_steps(directory) == files.open_directory(directory) == [3]
            assert checkpoint_steps(saved) == {"3"}


def test_what_others_have_written_and_deleted_is_seen(saved: Bucket):
    """As by whoever reads the parameters of a run that goes on."""
    directory = files.directory_of(RUN, None)
    assert files.complete_steps(directory) == [3, 7]
    seven = {name: saved.objects.pop(name) for name in list(saved.objects) if name.startswith("run/7/")}
    assert files.complete_steps(directory) == [3]
    saved.objects |= seven
    assert files.complete_steps(directory) == [3, 7]


def test_objects_that_may_not_be_read_are_not_damaged(saved: Bucket):
    whole = dict(saved.objects)
    for item in ("state", "run"):
        saved.hidden = f"run/7/{item}/"
        checkpoints, said = opened(RUN)
        with pytest.raises(UserError, match=r"checkpoint 7 in .* cannot be read for now \(.*\): nothing was changed"):
            checkpoints.restore()
        checkpoints.close()
        assert said == [] and saved.objects == whole
    saved.hidden = ""
    assert restored(opened(RUN)[0]) == 7


def test_a_run_that_keeps_its_checkpoints_there(whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Begun where nothing is; the last two are kept, and the numbers are those of a run that saves on a disk."""
    with served() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        workdir, place = tmp_path / "run", "checkpoint.directory=gs://bucket/run"
        recipes.trained(workdir, place)
        recipes.assert_same_log(workdir, whole_run)
        assert checkpoint_steps(bucket) == {"10", "12"}


@pytest.mark.long
def test_a_bucket_that_takes_no_more_from_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One line, and what is there stays."""
    with served() as (bucket, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        never = ("train.eval_every_steps=0", "train.sample_every_steps=0")
        knobs = ("checkpoint.directory=gs://bucket/run", *never)
        recipes.trained(tmp_path / "run", *knobs, "train.num_steps=2")
        bucket.room = 0
        result = recipes.run(tmp_path / "run", *knobs, "train.num_steps=3")
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        assert "step 3 cannot be saved to gs://bucket/run" in result.stderr.splitlines()[-1]
        assert checkpoint_steps(bucket) == {"2"}
