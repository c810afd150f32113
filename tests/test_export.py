"""The verb: a run becomes a folder that others load, or nothing does."""

import importlib.util
import json
import types

import jax
import numpy as np
import pytest

from latentjax import export as verb
from latentjax.data.sample_text import PROSE, SOURCE
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.errors import UserError
from latentjax.interop import comparison
from latentjax.interop import writing as folders
from latentjax.interop.pretrained import load_pretrained
from latentjax.opening import open_model

pytest.importorskip("torch", reason="needs torch: pip install '.[peer]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peer]'")


def run(checkpoint, output, *flags):
    return verb.main(["--checkpoint", str(checkpoint), "--output", str(output), *map(str, flags)])


@pytest.fixture(scope="module")
def exported(whole_run, tmp_path_factory):
    """The folder that a run was exported to, and the result."""
    output = tmp_path_factory.mktemp("exports") / "mine"
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *line, **_: printed.append(" ".join(map(str, line))))
        assert run(whole_run, output, "--json") == 0
    return output, printed


def test_a_run_and_back(whole_run, exported):
    """The parameters that come back are those of the checkpoint, to the last bit."""
    output, printed = exported
    result = json.loads(printed[-1])
    assert result["output"] == str(output) and result["source"] == f"{whole_run}, step 12"
    assert 0 < result["difference"]["largest"] < 1e-5 and result["difference"]["num_tokens"] == 256
    assert printed[-2] == "comparing with transformers on 256 tokens of the run's held-out text ..."
    opened = open_model(whole_run)
    model, params = load_pretrained(output)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(opened.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert model.recurrence_spec.num_jacobi_iterations == opened.model.recurrence_spec.num_jacobi_iterations == 1
    assert result["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert open_model(output).tokenizer.fingerprint == ByteTokenizer().fingerprint
    assert not list(output.parent.glob("*.partial")) and not (output / ".latentjax-export").exists()


def test_transformers_loads_it_and_writes(exported):
    """Model, tokenizer and settings of the generation, by the auto classes."""
    output, _ = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(output)
    for text in (PROSE, SOURCE):
        assert tokenizer(text)["input_ids"] == ByteTokenizer().encode(text)
    inputs = tokenizer(["def ", "import os"], return_tensors="pt", padding=True)
    assert inputs["attention_mask"][0].tolist() == [0] * 5 + [1] * 4
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert ids.shape == (2, 15)
    alone = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=6, do_sample=False)
    assert ids[0, 5:].tolist() == alone[0].tolist()
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 256


def test_the_card_tells_of_the_run(exported, whole_run):
    card = (exported[0] / "README.md").read_text()
    metrics = [json.loads(line) for line in (whole_run / "metrics.jsonl").read_text().splitlines()]
    expected = [
        "library_name: transformers",
        "| tokens | 1,536 |",
        "| data | json |",
        f"| loss | {metrics[-1]['loss']:.4f} |",
        f"| eval_loss | {metrics[-1]['eval_loss']:.4f} |",
        "trust_remote_code=True",
        "1 latent thought before",
        f"jax {jax.__version__}",
        f'from_pretrained("{exported[0]}"',
    ]
    for line in expected:
        assert line in card, line
    assert str(whole_run) not in card  # the places of a machine are nobody's business


def test_a_step_in_sixteen_bits_and_shards(whole_run, tmp_path, capsys):
    assert run(whole_run, tmp_path / "out", "--step", 10, "--dtype", "bfloat16", "--max_shard_size", "8KB") == 0
    assert "step 10 to" in (line := capsys.readouterr().out) and "rounding moved logits by up to" in line
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    expected = jax.tree.map(
        lambda leaf: leaf.astype("bfloat16").astype("float32"), open_model(whole_run, step=10).params
    )
    for one, other in zip(
        jax.tree.leaves(load_pretrained(tmp_path / "out")[1]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_a_folder_is_exported_again(exported, tmp_path):
    """Its tokenizer and what it says of special tokens are passed on as they are."""
    output, _ = exported
    (output / "generation_config.json").write_text('{"eos_token_id": 256, "top_k": 7}')
    assert run(output, tmp_path / "again", "--no_check") == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "latentjax_tokenizer.json", "model.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    for name in ("config.json", "generation_config.json"):
        assert json.loads((output / name).read_text()) == json.loads((tmp_path / "again" / name).read_text())
    assert "Not compared" in (tmp_path / "again" / "README.md").read_text()


def test_nothing_is_left_of_an_export_that_differs(whole_run, tmp_path, monkeypatch, capsys):
    write = folders.write_weights
    monkeypatch.setattr(
        folders,
        "write_weights",
        lambda folder, params, *rest: write(folder, jax.tree.map(lambda x: 1.01 * x, params), *rest),
    )
    assert run(whole_run, tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "transformers computes something else" in said and "out was not made" in said
    assert list(tmp_path.iterdir()) == []


def test_without_torch_an_unchecked_export_must_be_asked_for(whole_run, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(comparison.importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(UserError, match=r"torch not installed.*pip install 'latentjax\[peer\]'.*--no_check"):
        run(whole_run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    assert run(whole_run, tmp_path / "out", "--no_check") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--step", "7"], "no checkpoint of step 7"),
        (["--step", "x"], "--step"),
        (["--dtype", "int8"], "--dtype"),
        (["--max_shard_size", "huge"], "--max_shard_size='huge' is no size"),
        (["--push_to_hub", "a/b/c"], "--push_to_hub='a/b/c' is no repository"),
        (["--output", "twice"], "--output is given twice"),
        (["--checkpoint"], "--checkpoint"),
    ],
)
def test_mistakes(flags, message, whole_run, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run(whole_run, tmp_path / "out", *flags)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(whole_run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out is there already"):
        run(whole_run, tmp_path / "out")
    with pytest.raises(UserError, match="there is no directory"):
        run("./nowhere/at/all", tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_upload(exported, tmp_path, monkeypatch, capsys):
    """The hub is told to make the repository and is given the folder; what it refuses is one line."""
    import huggingface_hub

    calls = []

    class Recorder:
        def create_repo(self, name, **options):
            calls.append(("create_repo", name, options))
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def upload_folder(self, **options):
            calls.append(("upload_folder", options))
            assert (tmp_path / "out" / "README.md").is_file()
            return types.SimpleNamespace(commit_url="hub/me/mine/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Recorder)
    assert run(exported[0], tmp_path / "out", "--no_check", "--push_to_hub", "mine") == 0
    message = "Model exported by latentjax"
    assert calls == [
        ("create_repo", "mine", {"exist_ok": True}),
        ("upload_folder", {"repo_id": "me/mine", "folder_path": str(tmp_path / "out"), "commit_message": message}),
    ]
    assert "uploaded: hub/me/mine/commit/1" in capsys.readouterr().err
    assert 'from_pretrained("mine"' in (tmp_path / "out" / "README.md").read_text()

    def refuse(self, name, **options):
        raise OSError("the network\nis down")

    monkeypatch.setattr(Recorder, "create_repo", refuse)
    with pytest.raises(UserError, match="other is whole, but was not uploaded to mine: the network is down"):
        run(exported[0], tmp_path / "other", "--no_check", "--push_to_hub", "mine")
    assert (tmp_path / "other" / "config.json").is_file()
