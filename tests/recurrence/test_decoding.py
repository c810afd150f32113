"""Generation: exact, batched, reproducible."""

import jax
import numpy as np
import pytest
from tiny import language_model, params_of, tokens

from latentjax.recurrence.decoding import generate

NUM_TOKENS = 10


def continued(model, prompts, lengths, *, key: int = 0, temperature: float = 0.0) -> np.ndarray:
    return np.asarray(
        generate(
            model,
            params_of(model),
            prompts,
            np.asarray(lengths, np.int32),
            jax.random.key(key),
            temperature,
            num_tokens=NUM_TOKENS,
        )
    )


@pytest.mark.parametrize("num_thoughts", [0, 1, 2])
def test_greedy_is_the_argmax_of_the_converged_forward(num_thoughts: int):
    model = language_model(num_thoughts)
    generated = continued(model, tokens(3, 4), [4, 4, 4])
    np.testing.assert_array_equal(generated[:, :4], tokens(3, 4))
    exact = model.apply({"params": params_of(model)}, generated, num_jacobi_iterations=num_thoughts * NUM_TOKENS)
    np.testing.assert_array_equal(generated[:, 4:], np.argmax(exact, axis=-1)[:, 3:-1])


@pytest.mark.parametrize("num_thoughts", [0, 1])
def test_prompts_of_different_length_do_not_disturb_each_other(num_thoughts: int):
    model = language_model(num_thoughts)
    prompts, lengths = tokens(3, 5), [2, 5, 1]
    together = continued(model, prompts, lengths)
    for row, length in enumerate(lengths):
        alone = continued(model, prompts[row : row + 1, :length], [length])
        np.testing.assert_array_equal(together[row], alone[0])


def test_sampling_follows_the_distribution_and_the_key():
    model = language_model(1)
    prompts = np.repeat(tokens(1, 3), 400, axis=0)
    drawn = continued(model, prompts, [3] * 400, temperature=1.0)
    np.testing.assert_array_equal(drawn, continued(model, prompts, [3] * 400, temperature=1.0))
    assert (drawn != continued(model, prompts, [3] * 400, key=1, temperature=1.0)).any()
    logits = model.apply({"params": params_of(model)}, prompts[:1], num_jacobi_iterations=3)[0, -1]
    expected = np.asarray(jax.nn.softmax(logits))
    frequencies = np.bincount(drawn[:, 3], minlength=len(expected)) / 400
    # Three standard errors of a frequency, everywhere.
    assert (np.abs(frequencies - expected) < 3 * np.sqrt(expected * (1 - expected) / 400) + 1e-3).mean() > 0.95
