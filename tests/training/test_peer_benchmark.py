"""When two implementations count as the same, what their times say, and how the largest batch is sought."""

import dataclasses
import functools

import jax
import pytest
from recipes import get_config

from latentjax.errors import UserError
from latentjax.interop.pretrained import params_from_tensors, tensors_from_params
from latentjax.training import peer_benchmark
from latentjax.training.peer_benchmark import (
    Agreement,
    PeerMaker,
    PeerTimes,
    check_agreement,
    largest_that_fits,
    our_step_fits,
    single_device_mesh,
)
from latentjax.training.programs import make_model
from latentjax.training.step import summed_loss


class Mirror:
    """A peer that is ours, from weights that went there and back."""

    def __init__(self, model, params):
        self._model, self._params = model, params

    def put_batch(self, batch):
        return batch

    def loss_and_gradients(self, batch):
        def mean_loss(params):
            return summed_loss(self._model, params, batch, 1, 0)[0] / batch["loss_weights"].sum()

        loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(self._params)
        return float(loss), tensors_from_params(gradients, self._model.spec)


@functools.cache
def agreement():
    config = get_config()
    config.model.dtype = "bfloat16"  # of the recipe, not of the check
    mesh = single_device_mesh(config)

    def make(config, spec, recurrence_spec, tensors, iterations, variant):
        assert (spec.dtype, iterations, variant) == ("float32", 1, "plain")
        return Mirror(make_model(config, mesh), params_from_tensors(tensors, spec, "here"))

    maker = PeerMaker(make=make, variants=lambda dtype: [], check_variant="plain", tensors=tensors_from_params)
    return check_agreement(config, mesh, maker, 1)


def test_the_same_computation_agrees():
    found = agreement()
    found.check()
    assert found.worst_difference < 1e-4
    assert 5.0 < found.loss < 6.5  # ln 257 = 5.55
    assert found.gradient_norm > 0.1


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"peer_loss": 5.001, "loss": 5.0}, "the losses differ by"),
        ({"peer_gradient_norm": 1.01, "gradient_norm": 1.0}, "the gradient norms differ by"),
        ({"worst_tensor": "head", "worst_difference": 0.1}, "the gradients of head differ by"),
    ],
    ids=str,
)
def test_another_computation_is_an_error(changes, what):
    with pytest.raises(UserError, match=f"does not compute the same: {what} .*; nothing was timed"):
        dataclasses.replace(agreement(), **changes).check()


def test_not_a_number_does_not_agree():
    with pytest.raises(UserError, match="does not compute the same"):
        Agreement(5.0, float("nan"), 1.0, 1.0, "head", 0.0).check()


def test_ratio_is_of_our_rate_to_the_peers():
    measured = PeerTimes(100, 3, (1.0, 2.0, 4.0), (3.0, 3.0, 4.0), "eager", {"eager": 3.0}, 1.0, 1.0)
    assert measured.best_ratio == 3.0
    assert measured.median_ratio == 1.5
    ours, peer, ratio = (line.split() for line in measured.lines()[1:])
    assert (ours[1:3], peer[1:3], ratio[1:]) == (["100.0", "50.0"], ["33.3", "33.3"], ["3.000", "1.500"])


@pytest.mark.parametrize("capacity", [0, 1, 2, 5, 16, 17, 100, 1000, 4096])
def test_largest_batch_is_found_to_one_part_in_sixteen(capacity):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= capacity

    found = largest_that_fits(fits, 4096)
    assert found <= capacity <= found + found // 16
    assert len(tried) == len(set(tried)) <= 20


def test_whether_a_step_fits(monkeypatch):
    """It runs on one device of several; and where the compiler runs out of memory, it does not fit."""
    config = get_config()
    config.recurrence.train_jacobi_iterations = (1,)
    assert single_device_mesh(config).size == 1
    assert our_step_fits(config)

    def too_large(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 7 bytes.")

    monkeypatch.setattr(peer_benchmark, "create_state", too_large)
    monkeypatch.setattr(peer_benchmark, "compile_lowered", lambda lowered, mesh: None)
    assert not our_step_fits(config)
