"""The method's reference implementation is the judge: its numbers, to the tolerances that its README states."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import cross_entropy

from latentjax.interop.pretrained import load_pretrained, tensors_from_params

CASES = Path(__file__).parents[1] / "fixtures" / "parity"
LATENT = ("gpt_neox-latent-c1-r3", "llama-latent-c1-r3", "gpt_neox-latent-c2-r2")
PASSES = ("gpt_neox-loop-1", "llama-loop-2", "llama-ponder-2")
PAUSE = ("gpt_neox-pause-1", "llama-pause-1")
ALL = ("gpt_neox-vanilla", "llama-vanilla-gqa", *LATENT, *PASSES, *PAUSE)


@dataclasses.dataclass(frozen=True)
class Case:
    """A reference model loaded as ours, and what the reference computed."""

    name: str

    @functools.cached_property
    def loaded(self):
        return load_pretrained(CASES / self.name)

    @functools.cached_property
    def expected(self):
        with np.load(CASES / self.name / "expected.npz") as arrays:
            return dict(arrays)

    @functools.cached_property
    def outputs(self):
        """Loss, logits and gradients at the case's own R, from one program."""
        model, params = self.loaded
        ids_BT = self.expected["input_ids"]

        def loss(params):
            logits_BTV = model.apply({"params": params}, ids_BT)
            return cross_entropy(logits_BTV, ids_BT), logits_BTV

        (loss, logits_BTV), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return loss, logits_BTV, tensors_from_params(grads, model.spec)

    @functools.cached_property
    def feed(self):
        """Compiled cached decoding of one token, and an empty cache."""
        model, params = self.loaded
        batch_size, num_tokens = self.expected["input_ids"].shape
        decode = jax.jit(functools.partial(model.apply, method="decode"))

        def feed(token_B, position, cache):
            return decode({"params": params}, jnp.asarray(token_B), jnp.full(batch_size, position), cache)

        return feed, model.empty_cache(batch_size, num_tokens)

    def logits_at(self, num_jacobi_iterations):
        model, params = self.loaded
        apply = jax.jit(functools.partial(model.apply, num_jacobi_iterations=num_jacobi_iterations))
        return apply({"params": params}, self.expected["input_ids"])


@pytest.fixture(scope="module")
def case(request, _loaded={}):  # noqa: B006 - keeps a case's compiled programs for the whole module
    return _loaded.setdefault(request.param, Case(request.param))


every_case = pytest.mark.parametrize("case", ALL, indirect=True)
latent_cases = pytest.mark.parametrize("case", LATENT, indirect=True)


@every_case
def test_logits_and_loss(case):
    """At the R of config.json."""
    loss, logits_BTV, _ = case.outputs
    np.testing.assert_allclose(logits_BTV, case.expected["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(loss, case.expected["loss"], rtol=0, atol=1e-4)


@every_case
def test_gradient_norms(case):
    """Of every parameter under its Hugging Face name, through every pass."""
    _, _, grads = case.outputs
    norms = {name: np.linalg.norm(grad) for name, grad in grads.items()}
    expected = {key.partition("/")[2]: x for key, x in case.expected.items() if key.startswith("grad_norm/")}
    assert norms.keys() == expected.keys()
    for name, norm in expected.items():
        np.testing.assert_allclose(norms[name], norm, rtol=1e-3, err_msg=name)


@pytest.mark.parametrize("case", ("gpt_neox-latent-c1-r3", "llama-latent-c1-r3"), indirect=True)
def test_whole_gradients(case):
    """Element by element, which a norm would not tell from a permutation."""
    _, _, grads = case.outputs
    expected = {key.partition("/")[2]: x for key, x in case.expected.items() if key.startswith("grad/")}
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        error = np.linalg.norm(grads[name] - grad) / np.linalg.norm(grad)
        assert error < 1e-3, f"{name}: {error}"


@latent_cases
def test_loss_at_every_number_of_refinement_passes(case):
    """R = 0 .. 6, of which each differs from the next."""
    ids_BT = case.expected["input_ids"]
    losses = [float(cross_entropy(case.logits_at(passes), ids_BT)) for passes in range(7)]
    np.testing.assert_allclose(losses, case.expected["loss_by_iterations"], rtol=0, atol=1e-4)


@latent_cases
def test_exact_logits_by_many_refinement_passes(case):
    """R = C T passes reach the fixed point."""
    model, _ = case.loaded
    ids_BT = case.expected["input_ids"]
    logits_BTV = case.logits_at(model.recurrence_spec.num_latent_thoughts * ids_BT.shape[1])
    np.testing.assert_allclose(logits_BTV, case.expected["logits_exact"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(cross_entropy(logits_BTV, ids_BT), case.expected["loss_exact"], rtol=0, atol=1e-4)


@every_case
def test_exact_logits_by_cached_decoding(case):
    """Token by token, thought by thought; of a vanilla model the logits are exact anyhow."""
    feed, cache = case.feed
    expected = case.expected.get("logits_exact", case.expected["logits"])
    for position, token_B in enumerate(case.expected["input_ids"].T):
        logits_BV, cache = feed(token_B, position, cache)
        np.testing.assert_allclose(logits_BV, expected[:, position], rtol=0, atol=1e-4, err_msg=f"token {position}")


@latent_cases
def test_greedy_continuation_by_cached_decoding(case):
    """Eight tokens after a prompt of four, token for token."""
    feed, cache = case.feed
    ids_BT = case.expected["input_ids"][:, :4]
    for position in range(11):
        logits_BV, cache = feed(ids_BT[:, position], position, cache)
        if position >= 3:
            ids_BT = np.concatenate([ids_BT, np.argmax(logits_BV, axis=-1)[:, None].astype(np.int32)], axis=1)
    np.testing.assert_array_equal(ids_BT, case.expected["greedy_ids"])
