"""Beginning a run with other weights: what is taken from there, how tokens enter, and that it is read once."""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import recipes
from safetensors.numpy import save_file
from tiny import language_model, params_of, tokens

from latentjax import train as train_verb
from latentjax.continuing import begin_from
from latentjax.errors import UserError
from latentjax.interop.pretrained import load_pretrained, tensors_from_params
from latentjax.models.spec import ModelSpec
from latentjax.opening import open_model
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training import loop, processes
from latentjax.training.mesh import make_mesh
from latentjax.training.signals import StopRequest
from latentjax.training.state import abstract_params

CASES = Path(__file__).parent / "fixtures" / "parity"
VANILLA = CASES / "gpt_neox-vanilla"


def config_from(source, method="latent", **recurrence):
    config = recipes.get_config(method)
    config.train.init_from = str(source)
    config.recurrence.update(recurrence)
    return config


def read(config, workdir):
    """The weights as a run of the config begins with them, on one device, and its model."""
    reading = begin_from(config, (), workdir)
    config.mesh.data = 1
    mesh = make_mesh(config, jax.devices()[:1])
    model = LanguageModel(ModelSpec(**{**config.model, "attention": "xla"}), RecurrenceSpec(**config.recurrence))
    return model, reading(abstract_params(model, mesh))


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def logits(model, params, ids, method=None):
    return jax.jit(functools.partial(model.apply, method=method))({"params": params}, ids)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(processes, "say", lines.append)
    return lines


def test_the_model_is_taken_from_a_folder(tmp_path, said):
    """Sizes and settings are; what says nothing of the weights is not. Nothing is said that does not differ."""
    config = config_from(CASES / "llama-vanilla-gqa", "vanilla")
    model, params = read(config, tmp_path)
    theirs, expected = load_pretrained(CASES / "llama-vanilla-gqa")
    assert_same(params, expected)
    assert (config.model.architecture, config.model.num_kv_heads, config.model.rotary_fraction) == ("llama", 2, 1.0)
    assert config.model.max_position_embeddings == 64 and config.recurrence.method == "vanilla"
    np.testing.assert_allclose(logits(model, params, tokens(2, 5)), logits(theirs, expected, tokens(2, 5)), atol=1e-6)
    assert said[0] == f"beginning with the weights of {CASES / 'llama-vanilla-gqa'}"
    assert "model.hidden_size=32" in said[1] and "model.num_layers" not in said[1] and len(said) == 2


@pytest.mark.parametrize("scale_embeddings", [True, False])
def test_tokens_enter_a_latent_model_as_they_entered_the_vanilla_one(tmp_path, said, scale_embeddings):
    """The table is divided by what multiplies it, or neither is; all other weights are the folder's."""
    model, params = read(config_from(VANILLA, scale_embeddings=scale_embeddings), tmp_path)
    vanilla, expected = load_pretrained(VANILLA)
    embed = lambda module, ids: module.vocabulary().embed(ids)  # noqa: E731
    ids = tokens(2, 7)
    entering = model.apply({"params": params}, ids, method=embed)
    np.testing.assert_allclose(entering, vanilla.apply({"params": expected}, ids, method=embed), rtol=1e-6)
    table = np.asarray(expected["embedding"]["embedding"])
    divisor = (2.5 * 32) ** 0.5 if scale_embeddings else 1.0
    np.testing.assert_allclose(params["embedding"]["embedding"], table / divisor, rtol=1e-6)
    assert any("divided by 8.944" in line for line in said) == scale_embeddings
    assert_same(params["backbone"], expected["backbone"])
    # What the first slot of a token gives is what the vanilla model predicted from.
    first = lambda module, ids: module.logits(  # noqa: E731
        module.backbone(module.vocabulary().embed(ids), np.arange(ids.shape[1])[None])[0]
    )
    found = logits(model, params, ids, method=first)
    np.testing.assert_allclose(found, logits(vanilla, expected, ids), atol=1e-4)


def test_from_one_number_of_thoughts_to_another(tmp_path, said):
    """Both multiply by the same, so the weights are as they are."""
    source = CASES / "gpt_neox-latent-c1-r3"
    _, params = read(config_from(source, num_latent_thoughts=2), tmp_path)
    assert_same(params, load_pretrained(source)[1])
    assert not any("divided" in line for line in said)


def test_a_tied_table_is_not_divided(tmp_path):
    """It is the head, too; the message says which knob."""
    config = json.loads((VANILLA / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"latent multiplies embeddings by 8\.944 .*scale_embeddings=False"):
        begin_from(config_from(tmp_path), (), tmp_path / "run")
    assert begin_from(config_from(tmp_path, scale_embeddings=False), (), tmp_path / "run") is not None


def test_a_flag_that_contradicts_is_one_line(tmp_path, monkeypatch):
    """By the name that scripts use; a flag that agrees is none."""
    monkeypatch.chdir(tmp_path)
    flags = ["--config", str(recipes.RECIPE), f"--config.init_from={VANILLA}", "--config.model.num_layers=3"]
    with pytest.raises(UserError, match=r"model\.num_layers=3 is not what the weights of train\.init_from=.* need 2"):
        train_verb.main(flags)
    begin_from(config_from(VANILLA), {"model.num_layers"}, tmp_path)
    with pytest.raises(UserError, match="no directory './gone'"):
        train_verb.main([*flags[:2], "--config.train.init_from=./gone"])


def test_from_a_run(whole_run, tmp_path, said):
    """Its newest checkpoint, and other than that a run of its own."""
    _, params = read(config_from(whole_run, num_latent_thoughts=2), tmp_path)
    assert_same(params, open_model(whole_run).params)
    assert said == [f"beginning with the weights of {whole_run}, step 12"]


def test_a_run_trains_from_a_folder_and_goes_on_without_it(tmp_path, monkeypatch):
    """With a learning rate of 0 it saves what it began with; then the folder is gone, and nobody asks for it."""
    first = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda *_: first)
    folder = tmp_path / "folder"
    vanilla = language_model(0, method="vanilla", vocab_size=257, intermediate_size=48)
    folder.mkdir()
    save_file(tensors_from_params(params_of(vanilla), vanilla.spec), folder / "model.safetensors")
    hf_config = {
        "model_type": "gpt_neox", "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2,
        "intermediate_size": 48, "vocab_size": 257, "max_position_embeddings": 64, "rotary_pct": 0.5,
        "rotary_emb_base": 100.0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(hf_config))

    def trained(num_steps):
        config = config_from(folder, scale_embeddings=False, train_jacobi_iterations=(1,))
        config.optimizer.learning_rate = 0.0
        config.train.update(num_steps=num_steps, eval_every_steps=0, sample_every_steps=0)
        config.model.loops = "rolled"
        initial = begin_from(config, (), tmp_path / "run")
        assert (config.model.intermediate_size, config.model.rope_theta) == (48, 100.0)
        loop.train(config, tmp_path / "run", StopRequest(), initial_params=initial)
        opened = open_model(tmp_path / "run")
        assert opened.step == num_steps
        assert_same(opened.params, params_of(vanilla))
        return initial

    assert trained(2) is not None
    shutil.rmtree(folder)
    assert trained(3) is None
