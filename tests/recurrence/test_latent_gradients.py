"""Gradients through the passes of latent thoughts, against passes written out one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import cross_entropy, language_model, params_of, tokens

from latentjax.models.remat import POLICIES

NUM_THOUGHTS, ITERATIONS = 1, 2
NUM_PASSES = NUM_THOUGHTS + ITERATIONS + 1
TOKENS_BT = tokens(2, 6)


@functools.cache
def loss_and_gradients(model):
    """Of the package's own forward."""

    def loss(params):
        return cross_entropy(model.apply({"params": params}, TOKENS_BT, num_jacobi_iterations=ITERATIONS), TOKENS_BT)

    return jax.jit(jax.value_and_grad(loss))(params_of(language_model(NUM_THOUGHTS)))


def unrolled_loss(params, constant_passes):
    """The method in plain Python: the thoughts made by the first `constant_passes` passes count as constants."""
    model = language_model(NUM_THOUGHTS)

    def run(module, tokens_BT):
        batch_size, num_tokens = tokens_BT.shape
        x_BTD = module.vocabulary().embed(tokens_BT)
        thoughts = []  # of every token, (B, T, D) each
        for n in range(NUM_PASSES):
            slots = 1 + len(thoughts)
            x_BSD = jnp.stack([x_BTD, *thoughts], axis=2).reshape(batch_size, num_tokens * slots, -1)
            positions_BS = jnp.repeat(jnp.arange(num_tokens), slots)[None]
            h_BTSD = module.backbone(x_BSD, positions_BS)[0].reshape(batch_size, num_tokens, slots, -1)
            if n == NUM_PASSES - 1:
                return module.logits(h_BTSD[:, :, -1])
            thoughts = [h_BTSD[:, :, k] for k in range(min(slots, NUM_THOUGHTS))]
            if n < constant_passes:
                thoughts = [jax.lax.stop_gradient(z_BTD) for z_BTD in thoughts]

    return cross_entropy(model.apply({"params": params}, TOKENS_BT, method=run), TOKENS_BT)


def assert_same_gradients(actual, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


def distance(one, other):
    squares = jax.tree.map(lambda a, b: float(np.sum((np.asarray(a) - b) ** 2)), one, other)
    return sum(jax.tree.leaves(squares)) ** 0.5


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_gradients_through_the_last_passes_only(passes):
    """k = 1 takes every thought as a constant; k = 2 cuts within the refinement passes, k = 3 before them."""
    loss, grads = loss_and_gradients(language_model(NUM_THOUGHTS, backprop_passes=passes))
    reference = jax.jit(jax.value_and_grad(functools.partial(unrolled_loss, constant_passes=NUM_PASSES - passes)))
    expected_loss, expected = reference(params_of(language_model(NUM_THOUGHTS)))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    assert_same_gradients(grads, expected, 1e-4)


def test_all_passes_is_what_zero_means():
    """k = C + R + 1 and k = 0 agree to the bit; fewer passes leave the loss, and change the gradients."""
    full_loss, full = loss_and_gradients(language_model(NUM_THOUGHTS))
    loss, grads = loss_and_gradients(language_model(NUM_THOUGHTS, backprop_passes=NUM_PASSES))
    assert loss == full_loss
    jax.tree.map(np.testing.assert_array_equal, grads, full)
    cut_loss, cut = loss_and_gradients(language_model(NUM_THOUGHTS, backprop_passes=1))
    np.testing.assert_allclose(cut_loss, full_loss, rtol=1e-6)
    assert distance(cut, full) > 1e-3


def test_full_gradients_against_finite_differences():
    """Along the gradient itself and along two random directions."""
    model = language_model(NUM_THOUGHTS)
    params = params_of(model)
    _, grads = loss_and_gradients(model)

    @jax.jit
    def loss(params):
        return cross_entropy(model.apply({"params": params}, TOKENS_BT, num_jacobi_iterations=ITERATIONS), TOKENS_BT)

    leaves, structure = jax.tree.flatten(grads)
    rng = np.random.default_rng(0)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in leaves))
    directions = [[np.asarray(g) / norm for g in leaves]]
    for _ in range(2):
        noise = [rng.standard_normal(g.shape).astype(np.float32) for g in leaves]
        directions.append([n / np.sqrt(sum(np.sum(n**2) for n in noise)) for n in noise])
    step = 1e-2
    for direction in directions:
        along = jax.tree.unflatten(structure, direction)
        ahead, behind = (float(loss(jax.tree.map(lambda p, d: p + sign * step * d, params, along))) for sign in (1, -1))
        slope = sum(np.sum(np.asarray(g) * d) for g, d in zip(leaves, direction))
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("remat", [name for name in POLICIES if name != "none"])
def test_remat_changes_neither_loss_nor_gradients(remat):
    """It only recomputes: the policy that keeps less has more matrix products in its backward pass."""
    plain = language_model(NUM_THOUGHTS)
    loss, grads = loss_and_gradients(plain)
    remat_loss, remat_grads = loss_and_gradients(
        dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, remat=remat))
    )
    np.testing.assert_allclose(remat_loss, loss, rtol=1e-6)
    assert_same_gradients(remat_grads, grads, 1e-5)


@pytest.mark.parametrize("remat", ["none", pytest.param("keep_layer_inputs", marks=pytest.mark.long)])
def test_unrolled_loops_change_neither_loss_nor_gradients(remat):
    """And none is left in the program."""
    rolled = language_model(NUM_THOUGHTS, num_layers=3, remat=remat)
    unrolled = dataclasses.replace(rolled, spec=dataclasses.replace(rolled.spec, loops="unrolled"))

    def lowered(model):
        loss = lambda params: cross_entropy(model.apply({"params": params}, TOKENS_BT), TOKENS_BT)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss)).lower(params_of(rolled))

    programs = lowered(rolled), lowered(unrolled)
    assert [program.as_text().count("stablehlo.while") > 0 for program in programs] == [True, False]
    (loss, grads), (unrolled_loss, unrolled_grads) = (program.compile()(params_of(rolled)) for program in programs)
    np.testing.assert_allclose(unrolled_loss, loss, rtol=1e-6)
    assert_same_gradients(unrolled_grads, grads, 1e-5)


def test_remat_policies_recompute_what_they_say():
    """Matrix products in the gradient's program: none < keep_matmul_outputs (attention again) < keep_layer_inputs."""

    def products(remat):
        model = language_model(0, remat=remat)
        loss = lambda params: cross_entropy(model.apply({"params": params}, TOKENS_BT), TOKENS_BT)  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss))(params_of(model))).count("dot_general[")

    none, matmuls, inputs, offloaded, passes = (products(remat) for remat in POLICIES)
    assert none < matmuls < inputs == offloaded < passes


def test_remat_policies_keep_what_they_say():
    """Bytes that a forward pass hands to the backward pass fall from policy to policy, parameters left out."""
    params = params_of(language_model(1, num_layers=5))

    def kept_bytes(remat):
        model = language_model(1, remat=remat, num_layers=5)
        loss = lambda params: cross_entropy(model.apply({"params": params}, TOKENS_BT), TOKENS_BT)  # noqa: E731
        residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
        size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
        return size(residuals) - size(params)

    none, matmuls, inputs, offloaded, passes = (kept_bytes(remat) for remat in POLICIES)
    layer_input = 2 * 12 * 16 * 4  # (B, S, D) in float32
    assert passes < inputs == offloaded < matmuls < none
    # Four passes of five layers, the first over half the slots: all but one input of a pass are recomputed.
    assert inputs - passes > 3 * 4 * layer_input


def test_offloaded_layer_inputs_go_to_the_host():
    """Those of the scanned layers in one array."""
    model = language_model(0, remat="offload_layer_inputs", num_layers=5)
    loss = lambda params: cross_entropy(model.apply({"params": params}, TOKENS_BT), TOKENS_BT)  # noqa: E731
    assert "f32<host>[4,2,6,16]" in str(jax.make_jaxpr(jax.grad(loss))(params_of(model)))
