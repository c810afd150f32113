"""Model FLOPs of training against the matrix products in programs that XLA has compiled, product by product."""

import jax
import pytest
from tiny import cross_entropy, language_model, params_of, tokens

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import Recurrence
from latentjax.recurrence.methods import METHODS, make_recurrence, train_recurrence
from latentjax.training.flops import causal_attention_flops, train_flops_per_token
from latentjax.training.hlo import parse
from latentjax.training.hlo_costs import count_costs

BATCH, LENGTH, ITERATIONS = 2, 8, 1


def hidden_scores_flops(spec: ModelSpec, recurrence: Recurrence, iterations: int = ITERATIONS) -> float:
    """Per token of a step: what one chunk of queries computes of scores beyond the half that is counted."""
    scores, passes = 0.0, recurrence.passes(iterations)
    first_trained = len(passes) - recurrence.num_trained_passes(iterations)
    for number, (slots, kept) in enumerate(zip(passes, recurrence.kept_slots(iterations), strict=True)):
        queries = (spec.num_layers - 1) * slots + kept
        # None of the thoughts that a refinement pass is for sees the last slot, so that it is left out.
        unseen = kept if kept < slots and number < len(passes) - 1 else 0
        scores += (queries * slots * LENGTH - 2 * unseen) * (3 if number >= first_trained else 1)
    return causal_attention_flops(spec.num_heads * scores, spec.head_dim)


@pytest.mark.parametrize(
    ("method", "architecture"),
    [
        # The blocks differ in what they multiply, not in how a method goes over them.
        pytest.param(method, name, marks=[] if name == "gpt_neox" or method == "latent" else pytest.mark.long)
        for method in METHODS
        for name in ("gpt_neox", "llama", "gpt2")
    ],
)
def test_training_has_the_products_that_are_counted(method: str, architecture: str):
    """Forward and backward of every method on every architecture; XLA's own count adds little that is no product."""
    model = language_model(
        1, architecture, method=method, hidden_size=64, intermediate_size=96, vocab_size=80, loops="unrolled"
    )
    spec, recurrence, tokens_BT = model.spec, make_recurrence(model.recurrence_spec), tokens(BATCH, LENGTH)

    def loss(params):
        logits_BTV = model.apply({"params": params}, tokens_BT, num_jacobi_iterations=ITERATIONS)
        return cross_entropy(logits_BTV, tokens_BT)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params_of(model)).compile()
    costs = count_costs(parse(compiled.as_text()))
    assert costs.unknown_loops == 0
    per_token = train_flops_per_token(spec, recurrence, LENGTH, ITERATIONS) + hidden_scores_flops(spec, recurrence)
    # The predictions of a pondering step are computed again in the backward pass, unless XLA finds them still there.
    again = 2.0 * spec.hidden_size * spec.vocab_size * recurrence.vocabulary_products / 2
    assert costs.flops / (BATCH * LENGTH) - per_token in (0.0, again)
    assert costs.flops < compiled.cost_analysis()["flops"] < 1.25 * costs.flops


@pytest.mark.parametrize("thoughts", [0, 1])
def test_a_stage_has_the_products_of_its_thoughts(thoughts: int):
    """Of a model with two."""
    model = language_model(2, hidden_size=64, intermediate_size=96, vocab_size=80, loops="unrolled")
    recurrence, tokens_BT = train_recurrence(model.recurrence_spec, thoughts), tokens(BATCH, LENGTH)

    def loss(params):
        hidden_BTD, _ = model.apply(
            {"params": params}, tokens_BT, num_latent_thoughts=thoughts, num_jacobi_iterations=thoughts, method="hidden"
        )
        return cross_entropy(model.apply({"params": params}, hidden_BTD, method="logits"), tokens_BT)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params_of(model)).compile()
    flops = train_flops_per_token(model.spec, recurrence, LENGTH, thoughts)
    flops += hidden_scores_flops(model.spec, recurrence, thoughts)
    assert count_costs(parse(compiled.as_text())).flops / (BATCH * LENGTH) == flops


@pytest.mark.parametrize(("loops", "tolerance"), [("unrolled", 0.0), ("rolled", 1e-3)])
def test_passes_without_gradients_are_computed_forward_alone(loops: str, tolerance: float):
    """Growing and two of three refinement passes; in a loop of unknown length they count as one turn of it."""
    model = language_model(1, backprop_passes=2, hidden_size=64, intermediate_size=96, vocab_size=80, loops=loops)
    spec, recurrence, tokens_BT = model.spec, make_recurrence(model.recurrence_spec), tokens(BATCH, LENGTH)
    settled = {"num_latent_thoughts": 1, "tolerance": tolerance, "method": "hidden_settled"}

    def loss(params):
        how = settled if tolerance else {"method": "hidden"}
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT, num_jacobi_iterations=3, **how)
        return cross_entropy(model.apply({"params": params}, hidden_BTD, method="logits"), tokens_BT)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params_of(model)).compile()
    costs = count_costs(parse(compiled.as_text()))
    assert costs.unknown_loops == (tolerance > 0)
    iterations = 2 if tolerance else 3
    flops = train_flops_per_token(spec, recurrence, LENGTH, iterations)
    flops += hidden_scores_flops(spec, recurrence, iterations)
    assert costs.flops / (BATCH * LENGTH) == flops


@pytest.mark.parametrize("backprop_passes", [0, 2])
def test_passes_over_one_place_have_the_products_that_are_counted(backprop_passes: int):
    """One thought, two refinements: of tokens, thoughts, tokens and so on; in loops, that XLA merges nothing."""
    model = language_model(
        1, "llama", num_layers=3, hidden_size=64, intermediate_size=96, vocab_size=80, loops="rolled",
        backprop_passes=backprop_passes, refinement="alternating",
    )  # fmt: skip
    spec, recurrence, tokens_BT = model.spec, train_recurrence(model.recurrence_spec, 1), tokens(BATCH, LENGTH)

    def loss(params):
        hidden_BTD, _ = model.apply(
            {"params": params}, tokens_BT, num_latent_thoughts=1, num_jacobi_iterations=2, method="hidden"
        )
        return cross_entropy(model.apply({"params": params}, hidden_BTD, method="logits"), tokens_BT)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params_of(model)).compile()
    passes = list(zip(recurrence.kept_slots(2), recurrence.seen_slots(2), strict=True))
    assert recurrence.token_forwards(2) == len(passes) == 6
    scores = 0.0
    for number, (kept, seen) in enumerate(passes):
        # All queries meet all keys up to the last query, of which half is counted.
        beyond = seen * LENGTH - 2 * (seen - 1 - number % 2)
        trained = number >= len(passes) - recurrence.num_trained_passes(2)
        scores += (spec.num_layers - 1 + kept) * beyond * (3 if trained else 1)
    flops = train_flops_per_token(spec, recurrence, LENGTH, 2)
    flops += causal_attention_flops(spec.num_heads * scores, spec.head_dim)
    assert count_costs(parse(compiled.as_text())).flops / (BATCH * LENGTH) == flops
