"""Opening a model: from a run that may be going on, from folders, onto meshes; what is there stays as it is."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import tokens

from latentjax import opening
from latentjax.config import default
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.errors import UserError
from latentjax.interop.pretrained import load_pretrained
from latentjax.opening import open_model
from latentjax.training import checkpoint_files, run_directory

CASES = Path(__file__).parent / "fixtures" / "parity"
FOLDER = CASES / "gpt_neox-latent-c1-r3"


@pytest.fixture
def run(whole_run, tmp_path):
    """A copy of a run that a test may damage."""
    return shutil.copytree(whole_run, tmp_path / "run")


def saved_params(workdir, step):
    """What the trainer's own way of reading gives."""
    return ocp.StandardCheckpointer().restore((workdir / "checkpoints" / str(step) / "state").absolute())["params"]


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)


def stamps(directory):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.rglob("*")}


def damage(workdir, step):
    """Changes bytes all over the files that hold a checkpoint's arrays."""
    files = [path for path in (workdir / "checkpoints" / str(step) / "state").glob("**/d/*") if path.is_file()]
    assert files
    for path in files:
        content = bytearray(path.read_bytes())
        content[::97] = bytes(byte ^ 1 for byte in content[::97])
        path.write_bytes(content)


def test_the_newest_step_of_a_run_that_is_going_on(whole_run):
    """Read while another process holds the directory's lock, and not a file is made or touched."""
    config = opening.read_run_config(whole_run)
    changes, lock = run_directory.claim(whole_run, config)
    before = stamps(whole_run)
    opened = open_model(whole_run)
    lock.close()
    assert changes == [] and stamps(whole_run) == before
    assert_same(opened.params, saved_params(whole_run, 12))
    assert (opened.step, opened.source, opened.config) == (12, f"{whole_run}, step 12", config)
    assert isinstance(opened.tokenizer, ByteTokenizer)
    assert (opened.model.recurrence_spec.num_latent_thoughts, opened.model.spec.hidden_size) == (1, 16)


def test_a_step_by_its_number(whole_run):
    assert_same(open_model(str(whole_run), step=10).params, saved_params(whole_run, 10))
    assert any(np.any(np.asarray(a) != b) for a, b in zip(*map(jax.tree.leaves, (
        saved_params(whole_run, 10), saved_params(whole_run, 12))), strict=True))  # fmt: skip
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*: there are 10, 12"):
        open_model(whole_run, step=7)


def test_a_damaged_checkpoint_is_passed_over_and_left_where_it_is(run):
    damage(run, 12)
    before, notes = stamps(run), []
    opened = open_model(run, note=notes.append)
    assert opened.step == 10 and len(notes) == 1
    assert "checkpoint 12" in notes[0] and "is damaged" in notes[0] and "that of step 10" in notes[0]
    assert_same(opened.params, saved_params(run, 10))
    with pytest.raises(UserError, match="checkpoint 12 in .* is damaged .*: take another"):
        open_model(run, step=12)
    damage(run, 10)
    with pytest.raises(UserError, match="all 2 are damaged, step 12 for one"):
        open_model(run)
    assert stamps(run).keys() == before.keys()


def test_numbers_that_are_not_what_was_saved(run):
    """By their checksums, where the files can be read; those of the optimizer's state are not asked for."""

    def change_checksum(step, name):
        path = run / "checkpoints" / str(step) / "run" / "metadata"
        notes = json.loads(path.read_text())
        del notes["sha256"]
        notes["arrays"][next(each for each in notes["arrays"] if each.startswith(name))][2] ^= 1
        path.write_text(json.dumps(checkpoint_files.seal(notes)))

    change_checksum(12, "opt_state")
    assert open_model(run).step == 12
    change_checksum(12, "params.embedding")
    notes = []
    assert open_model(run, note=notes.append).step == 10
    assert "(the checksum of params.embedding.embedding is another than when it was saved)" in notes[0]


def test_a_checkpoint_that_the_run_deletes_meanwhile(run, monkeypatch):
    """It has written others by then: they are looked for again, and no damage is spoken of."""
    list_steps, listings = checkpoint_files.complete_steps, []

    def vanishing(directory):
        listings.append(list_steps(directory))
        if len(listings) == 1:
            shutil.rmtree(directory / "12")
        return listings[-1]

    monkeypatch.setattr(checkpoint_files, "complete_steps", vanishing)
    notes = []
    assert open_model(run, note=notes.append).step == 10
    assert notes == [] and listings == [[10, 12], [10], [10]]


def test_no_checkpoint_yet(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="there is no checkpoint in .* yet"):
        open_model(run)


def test_runs_of_other_versions(run):
    """Without the tokenizer's files, which were once not kept; with a knob less, and one more that is none any more."""
    shutil.rmtree(run / "tokenizer")
    config = json.loads((run / "config.json").read_text())
    del config["model"]["loops"]
    config["train"]["gone"] = 1
    (run / "config.json").write_text(json.dumps(config))
    opened = open_model(run)
    assert isinstance(opened.tokenizer, ByteTokenizer) and opened.config.model.loops == "auto"
    config["data"]["tokenizer"] = "nowhere.json"
    (run / "config.json").write_text(json.dumps(config))
    assert open_model(run).tokenizer is None
    config["model"]["new"] = 1
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is not a latentjax config.*new"):
        open_model(run)


def test_another_tokenizer_than_the_checkpoint_names_is_none(run):
    fingerprint = ByteTokenizer().fingerprint
    config = opening.read_run_config(run)
    assert opening.tokenizer_of_run(run, config, fingerprint).fingerprint == fingerprint
    assert opening.tokenizer_of_run(run, config, "another") is None


def test_a_config_of_another_model_is_one_line(run):
    config = json.loads((run / "config.json").read_text())
    config["model"]["intermediate_size"] = 48
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds another model's state: params\.\S+ is float32\[\S+\] there and"):
        open_model(run)
    config["model"]["num_heads"] = 3
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config\.json is damaged: model\.hidden_size=16 .*num_heads=3"):
        open_model(run)


def test_a_folder(tmp_path):
    """The same as `load_pretrained`; a tokenizer that has no Hugging Face form is found beside it."""
    opened = open_model(FOLDER)
    model, params = load_pretrained(FOLDER)
    assert_same(opened.params, params)
    assert dataclasses.replace(opened.model.spec, loops="rolled") == model.spec
    assert opened.model.recurrence_spec == model.recurrence_spec
    assert (opened.tokenizer, opened.step, opened.config, opened.source) == (None, None, None, str(FOLDER))
    folder = shutil.copytree(FOLDER, tmp_path / "folder")
    ByteTokenizer().save(folder)
    assert isinstance(opening.tokenizer_of_folder(folder), ByteTokenizer)
    with pytest.raises(UserError, match="a step was given, 3, but .*gpt_neox-latent-c1-r3 is no run"):
        open_model(FOLDER, step=3)


def test_dtypes(whole_run):
    """Parameters are rounded once they have been checked; activations are another matter."""
    opened = open_model(whole_run, dtype="bfloat16", param_dtype="bfloat16")
    assert opened.model.spec.dtype == "bfloat16"
    assert_same(opened.params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), saved_params(whole_run, 12)))
    with pytest.raises(UserError, match="param_dtype='float16' is not known: choose float32 or bfloat16"):
        open_model(whole_run, param_dtype="float16")


@pytest.mark.parametrize("kind", ["run", "folder"])
def test_onto_a_mesh(kind, whole_run):
    """Sharded as in training, the same numbers; computing gives the same, too."""
    place, tensor = (whole_run, 1) if kind == "run" else (FOLDER, 2)  # the run's vocabulary is odd
    sizes = default().mesh
    sizes.update(data=-1, fsdp=2, tensor=tensor)
    one, spread = open_model(place), open_model(place, mesh=sizes)
    assert_same(one.params, spread.params)
    kernel = spread.params["backbone"]["last_layer"]["mlp_in"]["kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor") and spread.mesh.size == 8
    if kind == "folder":
        ids = tokens(4, 6)
        expected = one.model.apply({"params": one.params}, ids)
        with opening.programs.sharded_tracing(spread.mesh):
            found = jax.jit(spread.model.apply)({"params": spread.params}, ids)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    sizes.update(data=1, fsdp=1, tensor=8)
    with pytest.raises(UserError, match=r"model\.num_heads is \d, which mesh\.tensor = 8 does not divide"):
        open_model(place, mesh=sizes)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("no/such/place", "no directory 'no/such/place', and it is no id of the Hugging Face hub"),
        ("./nothing", "no directory './nothing', and it is no id"),
        ("a" * 5000, "there is no (model at|directory) 'aaa"),
        (__file__, r"test_opening\.py is a file: give the directory"),
        (Path(__file__).parent, r"config\.json is missing"),
    ],
)  # fmt: skip
def test_nothing_there(name, pattern):
    with pytest.raises(UserError, match=pattern) as caught:
        open_model(name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
