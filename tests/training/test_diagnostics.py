"""Diagnostics of the Jacobi iteration against the same numbers computed one by one."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.data.windows import document_layout
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training.diagnostics import diagnose, fit_contraction, make_diagnostic_step, position_bins
from latentjax.training.step import make_eval_step

NUM_TOKENS, ROWS = 12, 3
EOD = 7
# One thought and no documents; two thoughts and documents that are told apart.
CASES = {"plain": language_model(1), "masked": language_model(2, "llama")}


def batches_of(case: str) -> list[dict[str, np.ndarray]]:
    """Two batches, the last row of the second without weight: it fills the batch up."""
    batches = []
    for number in range(2):
        rows = tokens(ROWS, NUM_TOKENS + 1, seed=number)
        rows[:, 5] = EOD
        batch = {"tokens": rows, "loss_weights": np.ones((ROWS, NUM_TOKENS), np.float32)}
        if case == "masked":
            batch["segment_ids"], batch["positions"], batch["loss_weights"] = document_layout(rows, EOD)
        batch["target_bytes"] = np.random.default_rng(number).integers(1, 5, (ROWS, NUM_TOKENS)).astype(np.int32)
        batches.append(batch)
    batches[1]["loss_weights"][-1] = 0
    batches[1]["target_bytes"][-1] = 0
    return batches


def most_passes(case: str) -> int:
    """C T, which are exact."""
    return CASES[case].recurrence_spec.num_latent_thoughts * NUM_TOKENS


@functools.cache
def found(case: str) -> dict[str, Any]:
    """What is to be tested."""
    model = CASES[case]
    step = jax.jit(make_diagnostic_step(model, num_jacobi_iterations=most_passes(case), loss_chunk_tokens=5))
    return diagnose(step, params_of(model), batches_of(case), dtype="float32")


@functools.partial(jax.jit, static_argnames=("model", "num_jacobi_iterations"))
def _after(model: LanguageModel, params: Any, batch: dict[str, jax.Array], num_jacobi_iterations: int) -> tuple:
    return model.apply(
        {"params": params},
        batch["tokens"][:, :-1],
        num_jacobi_iterations=num_jacobi_iterations,
        positions_BT=batch.get("positions"),
        segment_ids_BT=batch.get("segment_ids"),
        method="hidden",
    )


@functools.cache
def hidden(case: str, num_jacobi_iterations: int) -> np.ndarray:
    """What the head reads after R passes in all rows that count, (5, T, D) float64."""
    model, count = CASES[case], 2 * ROWS - 1
    parts = [_after(model, params_of(model), batch, num_jacobi_iterations)[0] for batch in batches_of(case)]
    return np.asarray(jnp.concatenate(parts)[:count], np.float64)


def relative(change: np.ndarray, size: np.ndarray) -> float:
    return float(np.sqrt(np.sum(np.square(change)) / np.sum(np.square(size))))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("num_jacobi_iterations", [0, 3])
def test_losses_are_those_of_the_evaluation(case: str, num_jacobi_iterations: int):
    model = CASES[case]
    step = jax.jit(make_eval_step(model, num_jacobi_iterations=num_jacobi_iterations, loss_chunk_tokens=5))
    sums = [step(params_of(model), batch) for batch in batches_of(case)]
    nats, weight, text_bytes = (
        sum(float(each[name]) for each in sums) for name in ("loss_sum", "weight_sum", "text_bytes")
    )
    one = found(case)["passes"][num_jacobi_iterations]
    assert one["num_jacobi_iterations"] == num_jacobi_iterations
    assert one["loss"] == pytest.approx(nats / weight, rel=1e-6)
    assert one["bits_per_byte"] == pytest.approx(nats / np.log(2) / text_bytes, rel=1e-6)
    assert found(case)["num_tokens"] == weight and found(case)["rows"] == 5


def test_residuals_are_those_of_the_training_forward():
    """Of one full batch: there the forward's mean is over just the rows that count."""
    model, batch = CASES["plain"], batches_of("plain")[0]
    step = jax.jit(make_diagnostic_step(model, num_jacobi_iterations=3, loss_chunk_tokens=0))
    residuals = [
        each["thought_residual"] for each in diagnose(step, params_of(model), [batch], dtype="float32")["passes"]
    ]
    _, expected = _after(model, params_of(model), batch, 3)
    assert residuals[0] is None
    np.testing.assert_allclose(residuals[1:], expected, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_distances_are_from_where_the_iteration_ends(case: str):
    """Sequential decoding on the one side, C T passes on the other."""
    exact, distances = hidden(case, most_passes(case)), [each["distance_from_exact"] for each in found(case)["passes"]]
    for num_jacobi_iterations in (0, 3):
        expected = relative(hidden(case, num_jacobi_iterations) - exact, exact)
        assert distances[num_jacobi_iterations] == pytest.approx(expected, rel=1e-3) and expected > 1e-4
    assert 0 <= distances[-1] < 2e-6
    last = found(case)["passes"][-1]
    assert found(case)["exact"]["loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert found(case)["exact"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_distances_by_position(case: str):
    """With documents told apart, of the position in the document: the first tokens of each are exact."""
    exact = hidden(case, most_passes(case))
    change = hidden(case, 3) - exact
    positions = np.broadcast_to(np.arange(NUM_TOKENS), (6, NUM_TOKENS))
    if case == "masked":
        positions = np.concatenate([batch["positions"] for batch in batches_of(case)])
    assert positions.max() == (5 if case == "masked" else 11)
    by_position = found(case)["by_position"]
    assert [each["first_position"] for each in by_position] == ([0, 4] if case == "masked" else [0, 4, 8])
    assert by_position[0]["last_position"] == 3
    for each in by_position:
        there = (positions[:5] >= each["first_position"]) & (positions[:5] <= each["last_position"])
        assert each["num_tokens"] == there.sum() and len(each["distance_from_exact"]) == most_passes(case) + 1
        expected = relative(change[there], exact[there])
        assert each["distance_from_exact"][3] == pytest.approx(expected, rel=1e-3, abs=2e-6)
    if case == "plain":  # C + R tokens
        first, second, _ = (each["distance_from_exact"] for each in by_position)
        assert first[3] < 2e-6 < 1e-5 < first[2] and second[3] > 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_contraction_leads_from_the_first_distance_to_the_last_above_the_floor(case: str):
    values = [each["distance_from_exact"] for each in found(case)["passes"]]
    factor, fitted = found(case)["contraction"]["distance"], found(case)["passes_fitted"]["distance"]
    assert 4 < fitted < len(values)  # it is at the floor before C T passes
    floor = found(case)["rounding_floor"]["distance"]
    assert min(values[:fitted]) > floor >= values[fitted]
    assert factor == pytest.approx((values[fitted - 1] / values[0]) ** (1 / (fitted - 1)), rel=0.2)


def geometric(first: float, factor: float, floor: float, count: int = 21) -> list[float]:
    """A geometric sequence and rounding, as independent errors add up."""
    return np.hypot(first * factor ** np.arange(count), floor).tolist()


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 2e-7), ("float32", 1e-6), ("bfloat16", 3e-3)])
def test_the_factor_of_a_sequence_that_ends_in_rounding(dtype: str, rounding: float):
    fit = fit_contraction(geometric(0.5, 0.35, rounding), dtype)
    assert fit.factor == pytest.approx(0.35, rel=0.02)
    assert rounding < fit.floor < 3 * rounding
    assert fit.num_passes == sum(value > fit.floor for value in geometric(0.5, 0.35, rounding))
    # Fewer passes, before rounding shows; and where what follows rounding is wild, that is not looked at.
    assert fit_contraction(geometric(0.5, 0.35, rounding, 4), dtype).factor == pytest.approx(0.35, rel=0.02)
    wild = [*geometric(0.5, 0.35, rounding), 0.1, 0.0, None]
    assert fit_contraction(wild, dtype) == fit


@pytest.mark.parametrize("factor", [0.95, 1.0, 1.3])
def test_the_factor_where_hardly_anything_is_gained(factor: float):
    fit = fit_contraction(geometric(0.5, factor, 0.0), "float32")
    assert fit.factor == pytest.approx(factor) and fit.num_passes == 21


@pytest.mark.parametrize("values", [[], [0.5], [0.5, 0.0], [1e-8] * 5, [0.5, 1e-8, 0.5], [0.5, None, 0.1], [None]])
def test_no_factor_of_fewer_than_two_passes(values: list[float | None]):
    assert fit_contraction(values, "float32").factor is None


def test_bins_of_positions():
    assert position_bins(3) == (0, 3) and position_bins(4) == (0, 4)
    assert position_bins(5) == (0, 4, 5) and position_bins(128) == (0, 4, 8, 16, 32, 64, 128)


def test_what_is_not_finite_is_not_a_number():
    """Of a model that training has broken."""
    model, batch = CASES["plain"], batches_of("plain")[0]
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params_of(model))
    step = jax.jit(make_diagnostic_step(model, num_jacobi_iterations=3, loss_chunk_tokens=0))
    result = diagnose(step, broken, [batch], dtype="float32")
    assert result["passes"][3] == {"num_jacobi_iterations": 3} | dict.fromkeys(
        ("loss", "bits_per_byte", "thought_residual", "distance_from_exact")
    )
    assert result["contraction"] == {"residual": None, "distance": None} and result["exact"]["loss"] is None


def test_methods_that_do_not_iterate_have_nothing_to_tell():
    model = language_model(0, method="vanilla")
    with pytest.raises(ValueError, match="no refinement passes"):
        model.apply(
            {"params": params_of(model)}, tokens(1, 4), num_jacobi_iterations=1, read=jnp.sum, method="hidden_each"
        )
