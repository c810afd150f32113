"""What `bench step` measures on, and what it concludes from the times."""

import jax
import numpy as np
import pytest
from recipes import get_config

from latentjax.errors import UserError
from latentjax.training.mesh import make_mesh
from latentjax.training.programs import abstract_batch
from latentjax.training.step_benchmark import StepTimes, benchmark_steps, device_batch, proportions, random_batch


def times(thoughts, iterations, forwards, seconds, **changes):
    fields = {
        "num_latent_thoughts": thoughts,
        "num_jacobi_iterations": iterations,
        "token_forwards": forwards,
        "model_flops": 1e6 * (forwards + 1),
        "num_tokens": 100,
        "peak_flops": 1e9,
        "seconds": seconds,
        "trace_seconds": 1.0,
        "compile_seconds": 2.0,
        "planned_bytes": 2**30,
        "peak_bytes": None,
        "peak_source": "",
    }
    return StepTimes(**fields | changes)


@pytest.mark.parametrize("masked", [False, True])
def test_the_batch_is_laid_out_as_in_training(masked):
    """Same arrays, shapes, dtypes and shardings as the programs take, with random tokens."""
    config = get_config()
    config.data.mask_documents = masked
    mesh = make_mesh(config, jax.devices())
    batch, wanted = device_batch(config, mesh), abstract_batch(config, mesh)
    assert batch.keys() == wanted.keys()
    for name, array in batch.items():
        assert (array.shape, array.dtype) == (wanted[name].shape, wanted[name].dtype), name
        assert array.sharding.is_equivalent_to(wanted[name].sharding, array.ndim), name
    assert len(np.unique(batch["tokens"])) > 64
    if masked:
        assert 2 < np.asarray(batch["segment_ids"]).max(axis=1).mean() < 10
        np.testing.assert_array_equal(batch["loss_weights"], batch["tokens"][:, :-1] != 0)


def test_rates_of_a_program():
    measured = times(1, 3, 9, (0.5, 0.1, 0.2))
    assert (measured.median, measured.best) == (0.2, 0.1)
    assert measured.tokens_per_second == pytest.approx(500)
    assert measured.slots_per_second == pytest.approx(4500)
    assert measured.mfu == pytest.approx(1e7 / 0.2 / 1e9)
    assert times(1, 3, 9, (0.5,), peak_flops=None).mfu is None


def test_ratios_compare_within_a_number_of_thoughts_and_the_first_of_each():
    """The median of the rounds' ratios: a round that was slow for both counts like any other."""
    results = [
        times(0, 0, 1, (1.0, 10.0, 1.0)),
        times(1, 2, 7, (7.0, 70.0, 8.0)),
        times(1, 3, 9, (9.0, 90.0, 8.0)),
        times(1, 4, 11, (14.0, 140.0, 14.0)),
    ]
    first, within, beyond = proportions(results)
    assert (first.small, first.large, first.promised, first.holds) == ((0, 0), (1, 2), False, True)
    assert (first.time_median, first.token_forwards, first.model_flops) == (7.0, 7.0, 4.0)
    assert (within.small, within.large) == ((1, 2), (1, 3))
    assert within.time_median == pytest.approx(9 / 7)
    assert within.time_best == pytest.approx(8 / 7)
    assert within.holds
    assert (beyond.small, beyond.large) == ((1, 2), (1, 4))
    assert beyond.time_median / beyond.token_forwards == pytest.approx(14 / 11)
    assert not beyond.holds


def test_the_method_must_have_thoughts():
    with pytest.raises(UserError, match="--thoughts: recurrence.method='vanilla' has no thoughts"):
        benchmark_steps(get_config("vanilla"), [1], 1, 1)


def test_random_tokens_lie_within_the_vocabulary():
    config = get_config()
    config.model.vocab_size = 2
    assert set(np.unique(random_batch(config, 4)["tokens"])) <= {0, 1}
