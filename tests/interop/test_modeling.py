"""The PyTorch model of exported folders, alone: the reference's numbers, decoding with a cache, padding, beams."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[peer]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peer]'")

from latentjax.interop.hf import configuration_latentjax as configurations  # noqa: E402
from latentjax.interop.hf import modeling_latentjax as modeling  # noqa: E402

CASES = Path(__file__).parents[1] / "fixtures" / "parity"
NAMES = sorted(path.name for path in CASES.iterdir() if path.is_dir())
LATENT = [name for name in NAMES if "latent" in name]
# Every method, and each architecture where the two differ in how they do it.
EACH_METHOD = ["gpt_neox-latent-c2-r2", "llama-latent-c1-r3", "gpt_neox-loop-1", "llama-pause-1", "llama-ponder-2"]
STEMS = {"gpt_neox": "GPTNeoX", "llama": "Llama"}
# Without a cache, thoughts are exact when every one has had its pass.
EXACT = {"use_cache": False, "num_jacobi_iterations": 24}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def load(name, attention="sdpa"):
    stem = STEMS[json.loads((CASES / name / "config.json").read_text())["model_type"]]
    config = getattr(configurations, f"Latentjax{stem}Config").from_pretrained(CASES / name)
    model_class = getattr(modeling, f"Latentjax{stem}ForCausalLM")
    model, report = model_class.from_pretrained(
        CASES / name, config=config, attn_implementation=attention, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@cache
def expected(name):
    with np.load(CASES / name / "expected.npz") as file:
        return dict(file)


def ids_of(name, rows=slice(None), columns=slice(None)):
    return torch.from_numpy(expected(name)["input_ids"][rows, columns]).long()


def assert_close(tensor, other, tolerance=1e-4):
    np.testing.assert_allclose(tensor.detach().numpy(), np.asarray(other), rtol=0, atol=tolerance)


def generated(model, ids, **options):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, **options)


@torch.no_grad()
def step_by_step(model, ids, **options):
    """Logits of one token after another."""
    rows, cache_of_model = [], None
    for column in range(ids.shape[1]):
        outputs = model(ids[:, column : column + 1], cache=cache_of_model, use_cache=True, **options)
        cache_of_model = outputs[modeling._CACHE]
        rows.append(outputs.logits)
    assert cache_of_model.get_seq_length() == ids.shape[1]
    return torch.cat(rows, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_s_numbers(name):
    """Logits, loss and the norm of every gradient, in training mode."""
    model, numbers, ids = load(name), expected(name), ids_of(name)
    outputs = model(ids, labels=ids)
    outputs.loss.backward()
    assert_close(outputs.logits, numbers["logits"])
    assert outputs.loss.item() == pytest.approx(float(numbers["loss"]), abs=1e-4)
    norms = {name.removeprefix("grad_norm/"): float(n) for name, n in numbers.items() if name.startswith("grad_norm/")}
    found = {name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()}
    model.zero_grad()
    assert found == pytest.approx(norms, rel=1e-3)
    assert model(ids).to_tuple()[0].shape == outputs.logits.shape  # no cache where none is asked for
    assert len(model(ids, return_dict=False)) == 1


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_loss_at_every_number_of_iterations(name):
    model, ids = load(name), ids_of(name)
    for iterations, loss in enumerate(expected(name)["loss_by_iterations"]):
        assert model(ids, labels=ids, num_jacobi_iterations=iterations).loss.item() == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("name", LATENT)
@torch.no_grad()
def test_with_a_cache_decoding_is_exact(name):
    """A prompt at once, in pieces of any length, and token by token; generate continues as the reference does."""
    model, exact, ids = load(name), expected(name)["logits_exact"], ids_of(name)
    outputs = model(ids, use_cache=True)
    assert_close(outputs.logits, exact)
    assert_close(step_by_step(model, ids), exact)
    first = model(ids[:, :5], use_cache=True)
    second = model(ids[:, 5:], past_key_values=first[modeling._CACHE])
    assert_close(torch.cat([first.logits, second.logits], 1), exact)
    np.testing.assert_array_equal(generated(model, ids[:, :4]), expected(name)["greedy_ids"])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LATENT])
@torch.no_grad()
def test_a_cache_changes_nothing(name):
    """Where there is nothing to iterate: all at once, and token by token."""
    model, logits, ids = load(name), expected(name)["logits"], ids_of(name)
    assert_close(model(ids, use_cache=True).logits, logits)
    assert_close(step_by_step(model, ids), logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EACH_METHOD)
@torch.no_grad()
def test_padding_on_either_side(name, attention):
    """Rows of a padded batch are what each is alone: logits without a cache, and what generate continues with."""
    model, short, long = load(name, attention), ids_of(name, slice(1), slice(6)), ids_of(name, slice(1, 2), slice(9))
    for left in (True, False):
        padded, mask = torch.zeros((2, 9), dtype=torch.long), torch.zeros((2, 9), dtype=torch.long)
        columns = slice(3, 9) if left else slice(6)
        padded[0, columns], mask[0, columns], padded[1], mask[1] = short[0], 1, long[0], 1
        logits = model(padded, attention_mask=mask).logits
        assert_close(logits[:1, columns], model(short).logits)
        assert_close(logits[1:], model(long).logits)
        if left:
            with_cache = model(padded, attention_mask=mask, use_cache=True, logits_to_keep=1).logits
            assert_close(with_cache[:1], model(short, use_cache=True).logits[:, -1:])
            both = generated(model, padded, attention_mask=mask)
            np.testing.assert_array_equal(both[:1, 3:], generated(model, short))
            np.testing.assert_array_equal(both[1:], generated(model, long))


@pytest.mark.parametrize("name", EACH_METHOD)
def test_beams_and_sampling_agree_with_generation_without_a_cache(name):
    """Beams reorder the cache; drawn with the same seed, the same tokens."""
    model, ids = load(name), ids_of(name, columns=slice(5))
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    with_cache = generated(model, ids, **beams)
    assert len({tuple(row) for row in with_cache.tolist()}) == len(with_cache)
    np.testing.assert_array_equal(with_cache, generated(model, ids, **beams, **EXACT))
    drawn = []
    for options in ({}, EXACT):
        torch.manual_seed(1)
        drawn.append(generated(model, ids, do_sample=True, top_k=0, **options))
    np.testing.assert_array_equal(*drawn)
    assert not torch.equal(drawn[0], generated(model, ids))


@pytest.mark.parametrize("name", ["gpt_neox-latent-c2-r2", "llama-ponder-2"])
@torch.no_grad()
def test_a_conversation_goes_on_from_its_cache(name):
    """generate counts tokens where the cache holds several slots or passes of each; and what it is to take back."""
    model, ids = load(name), ids_of(name, slice(1), slice(5))
    first = generated(model, ids, max_new_tokens=4, return_dict_in_generate=True)
    longer = torch.cat([first.sequences, ids_of(name, slice(1), slice(5, 9))], 1)
    continued = generated(model, longer, **{modeling._CACHE: first[modeling._CACHE]})
    np.testing.assert_array_equal(continued, generated(model, longer))
    # No token is the end, but looking up wants one.
    looked_up = generated(model, longer, prompt_lookup_num_tokens=3, eos_token_id=96)
    np.testing.assert_array_equal(looked_up, generated(model, longer))
    np.testing.assert_array_equal(generated(model, longer, prefill_chunk_size=3), generated(model, longer))


@torch.no_grad()
def test_a_prompt_is_refined_to_the_tolerance(monkeypatch):
    """A tolerance saves passes and keeps what it says; without one the passes end long before the worst case."""
    name = "gpt_neox-latent-c1-r3"
    model, ids = load(name), ids_of(name, slice(1)).repeat(1, 8)
    passes = []
    run = modeling.RecurrentLanguageModel._run
    monkeypatch.setattr(
        modeling.RecurrentLanguageModel, "_run", lambda self, *rest: passes.append(1) or run(self, *rest)
    )
    exact, counts, errors = step_by_step(model, ids), [], []
    for tolerance in (None, 1e-2):
        passes.clear()
        monkeypatch.setattr(model.config, "prefill_tolerance", tolerance, raising=False)
        errors.append((model(ids, use_cache=True).logits - exact).abs().max().item())
        counts.append(len(passes))
    assert counts[1] < counts[0] < ids.shape[1] / 2
    assert errors[0] < 1e-5 < errors[1] < 0.1


@pytest.mark.parametrize("name", EACH_METHOD)
def test_gradients_with_checkpointing_are_the_same(name):
    model, ids = load(name), ids_of(name)
    model.train()
    gradients = []
    # Another name in newer versions.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    disable = getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)
    for checkpointed in (False, True):
        if checkpointed:
            enable()
        model(ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    disable()
    model.eval()
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], 1e-6)


@torch.no_grad()
def test_embeddings_in_place_of_ids_and_chosen_logits():
    model, ids = load("gpt_neox-latent-c1-r3"), ids_of("gpt_neox-latent-c1-r3")
    logits = model(ids).logits
    assert_close(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, logits, 0)
    assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:], 1e-6)
    assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]], 1e-6)


def test_a_saved_model_loads_again(tmp_path):
    """After fine-tuning: the same names, the keys of the method kept."""
    model, ids = load("llama-ponder-2"), ids_of("llama-ponder-2")
    model.save_pretrained(tmp_path)
    again = modeling.LatentjaxLlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(again(ids).logits, model(ids).logits, 0)
    assert (again.config.method, again.config.num_latent_thoughts) == ("ponder", 2)


def test_what_cannot_be_is_said_in_one_line():
    model, ids = load("gpt_neox-latent-c1-r3"), ids_of("gpt_neox-latent-c1-r3")
    filled = transformers.DynamicCache()
    filled.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), 0)
    for arguments, message in (
        ({"input_ids": ids, modeling._CACHE: filled}, "a DynamicCache made elsewhere cannot hold the slots"),
        ({}, "either input_ids or inputs_embeds"),
        (
            {"input_ids": ids, "attention_mask": torch.ones(2, 5)},
            "covers 5 tokens, but there are 0 in the cache and 12",
        ),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 1, 12, 12)}, "4 dimensions"),
        ({"input_ids": ids, "output_attentions": True}, "not offered"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(**arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="a StaticCache made elsewhere .* leave cache_implementation out"):
        generated(model, ids, cache_implementation="static")
    for key, value, message in (
        ("method", "guess", "method='guess' is none of vanilla, latent"),
        ("num_latent_thoughts", -1, "num_latent_thoughts=-1"),
        ("pause_token_id", None, "pause_token_id=None is no token of the 96"),
    ):
        config = configurations.LatentjaxGPTNeoXConfig.from_pretrained(CASES / "gpt_neox-pause-1")
        setattr(config, key, value)
        with pytest.raises(ValueError, match=message):
            modeling.LatentjaxGPTNeoXForCausalLM(config)
