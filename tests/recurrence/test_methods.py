"""Ponder, loop and pause against what they are defined to be; cached decoding; causality, documents, recomputation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import cross_entropy, language_model, params_of, tokens

from latentjax.config import default
from latentjax.models import llama
from latentjax.training.mesh import arrange_mesh
from latentjax.training.programs import sharded_tracing
from latentjax.training.state import abstract_params

NUMBERS = {"ponder": 2, "loop": 3, "pause": 2}
# What the parity cases do not have: GPT-2 with its tied head and positions, ponder on GPT-NeoX, a loop of many runs.
CASES = (("ponder", "gpt_neox"), ("ponder", "gpt2"), ("loop", "gpt2"), ("pause", "gpt2"))
ARCHITECTURES = {"ponder": "gpt_neox", "loop": "gpt2", "pause": "gpt2"}  # where one is enough
VOCAB_SIZE = 32
TOKENS_BT = tokens(2, 6)
every_method = pytest.mark.parametrize("method", NUMBERS)
every_case = pytest.mark.parametrize(("method", "architecture"), CASES)


def model_of(method, architecture=None, number=None, **changes):
    architecture = architecture or ARCHITECTURES[method]
    return language_model(number or NUMBERS[method], architecture, method=method, vocab_size=VOCAB_SIZE, **changes)


def loss_and_gradients(logits_of, params):
    """Loss, logits and gradients of a function of the params, from one program."""

    @jax.jit
    def run(params):
        def loss(params):
            logits_BTV = logits_of(params)
            return cross_entropy(logits_BTV, TOKENS_BT), logits_BTV

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, logits_BTV), gradients = run(params)
    return loss, np.asarray(logits_BTV), gradients


@functools.cache
def computed(model):
    return loss_and_gradients(lambda params: model.apply({"params": params}, TOKENS_BT), params_of(model))


def ponder_written_out(model, params):
    """Passes of a vanilla model's backbone, one after another; the head and the table as matrices."""
    table_VD = params["embedding"]["embedding"]
    head_DV = table_VD.T if model.spec.tie_embeddings else params["head"]["kernel"]
    positions_BT = jnp.arange(TOKENS_BT.shape[1])[None]

    def run(module):
        e_BTD = 4.0 * table_VD[TOKENS_BT]
        for _ in range(NUMBERS["ponder"]):
            weights_BTV = jnp.exp(module.backbone(e_BTD, positions_BT)[0] @ head_DV)
            weights_BTV /= weights_BTV.sum(-1, keepdims=True)
            e_BTD = e_BTD + 4.0 * (weights_BTV @ table_VD)
        return module.backbone(e_BTD, positions_BT)[0] @ head_DV

    return language_model(0, model.spec.architecture).apply({"params": params}, method=run)


def loop_written_out(model, params):
    """A vanilla model with N + 1 times the layers, each of which comes N + 1 times."""
    times = NUMBERS["loop"] + 1
    changes = {"num_layers": times * model.spec.num_layers, "tie_embeddings": False, "vocab_size": VOCAB_SIZE}
    deep = language_model(0, model.spec.architecture, **changes)
    backbone, table_VD = params["backbone"], params["embedding"]["embedding"]
    once = jax.tree.map(lambda some, last: jnp.concatenate([some, last[None]]), backbone["layers"],
                        backbone["last_layer"])  # fmt: skip
    layers = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * times)[:-1], once)
    head = params.get("head", {"kernel": table_VD.T})
    embedding = {"embedding": 40**0.5 * table_VD}
    params = {"backbone": backbone | {"layers": layers}, "embedding": embedding, "head": head}
    return deep.apply({"params": params}, TOKENS_BT)


def pause_written_out(model, params):
    """A vanilla model that reads the last token of the vocabulary behind every other, at the same position."""
    slots = NUMBERS["pause"] + 1
    vanilla = language_model(0, model.spec.architecture, tie_embeddings=False, vocab_size=VOCAB_SIZE)
    table_VD = params["embedding"]["embedding"]
    params = {"head": {"kernel": table_VD.T}} | params | {"embedding": {"embedding": 4.0 * table_VD}}
    paused_BS = np.full((2, slots * TOKENS_BT.shape[1]), VOCAB_SIZE - 1)
    paused_BS[:, ::slots] = TOKENS_BT
    positions_BS = jnp.repeat(jnp.arange(TOKENS_BT.shape[1]), slots)[None]
    return vanilla.apply({"params": params}, paused_BS, positions_BT=positions_BS)[:, slots - 1 :: slots]


WRITTEN_OUT = {"ponder": ponder_written_out, "loop": loop_written_out, "pause": pause_written_out}


def assert_same_gradients(actual, expected, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        error = np.linalg.norm(a - b) / np.linalg.norm(b)
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error}"


@every_case
def test_logits_and_gradients_are_those_of_the_definition(method, architecture):
    model = model_of(method, architecture)
    params = params_of(model)
    _, logits_BTV, gradients = computed(model)
    _, expected_BTV, expected = loss_and_gradients(functools.partial(WRITTEN_OUT[method], model), params)
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=0, atol=2e-5)
    assert_same_gradients(gradients, expected, 1e-4)


@every_case
def test_cached_decoding_is_the_uncached_forward(method, architecture):
    """At every token, whatever the cache has room for beyond."""
    model = model_of(method, architecture)
    _, logits_BTV, _ = computed(model)
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    cache = model.empty_cache(2, TOKENS_BT.shape[1] + 2)
    for position, token_B in enumerate(TOKENS_BT.T):
        logits_BV, cache = decode({"params": params_of(model)}, token_B, jnp.full(2, position), cache)
        np.testing.assert_allclose(logits_BV, logits_BTV[:, position], rtol=0, atol=2e-5)
    slots = TOKENS_BT.shape[1] * (3 if method == "pause" else 1)
    assert (cache.length, cache.first_layer) == (slots, 0)
    assert cache.keys_NBGLK.shape[0] == 2 * {"ponder": 3, "loop": 4, "pause": 1}[method]
    assert np.all(np.any(cache.keys_NBGLK[..., :slots, :] != 0, axis=-1))
    assert np.all(cache.keys_NBGLK[..., slots:, :] == 0)


@every_method
def test_causality(method):
    """Another token t leaves every logit before t as it was and moves all from t on."""
    num_tokens = 7
    original_T = tokens(1, num_tokens)[0]
    tokens_BT = np.stack([original_T] * (num_tokens + 1))
    tokens_BT[np.arange(1, num_tokens + 1), np.arange(num_tokens)] = (original_T + 11) % 29
    model = model_of(method, num_layers=1)
    logits_BTV = np.asarray(jax.jit(model.apply)({"params": params_of(model)}, tokens_BT))
    change_BT = np.abs(logits_BTV[1:] - logits_BTV[:1]).max(axis=-1)
    before = np.tri(num_tokens, k=-1, dtype=bool)  # row t, columns before t
    assert change_BT[before].max() <= 1e-6
    assert change_BT[~before].min() > 1e-4


@every_method
def test_documents_in_a_row_do_not_know_of_each_other(method):
    """With segment ids and positions a document has the same logits at either end of a row, beside others."""
    short_T, long_T, other_T = tokens(1, 3, seed=1)[0], tokens(1, 5, seed=2)[0], tokens(1, 5, seed=3)[0]
    packed_BT = np.stack([np.r_[long_T, short_T], np.r_[short_T, other_T]])
    segment_ids_BT = np.array([[1] * 5 + [2] * 3, [1] * 3 + [2] * 5], np.int32)
    positions_BT = np.array([[*range(5), *range(3)], [*range(3), *range(5)]], np.int32)
    model = model_of(method)
    packed = jax.jit(model.apply)(
        {"params": params_of(model)}, packed_BT, segment_ids_BT=segment_ids_BT, positions_BT=positions_BT
    )
    np.testing.assert_allclose(packed[0, 5:], packed[1, :3], rtol=0, atol=1e-5)
    assert np.abs(packed[0, :5] - packed[1, 3:]).max() > 0.1


@pytest.mark.parametrize(
    ("method", "changes"),
    [("loop", {"remat": "keep_pass_inputs"}), ("ponder", {"loops": "unrolled"})],
    ids=["keep_pass_inputs", "unrolled"],
)
def test_remat_and_unrolled_loops_change_neither_loss_nor_gradients(method, changes):
    loss, _, gradients = computed(model_of(method))
    changed_loss, _, changed = computed(model_of(method, **changes))
    np.testing.assert_allclose(changed_loss, loss, rtol=1e-6)
    assert_same_gradients(changed, gradients, 1e-5)


@pytest.mark.parametrize("method", ["ponder", "pause"])
def test_on_a_mesh(method):
    """Parameters, rows, slots and vocabulary over eight devices: the same loss and gradients."""
    model = model_of(method)
    loss, _, gradients = computed(model)
    sizes = default().mesh
    sizes.update(data=1, fsdp=2, sequence=2, tensor=2)
    mesh = arrange_mesh(sizes, jax.devices())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(model, mesh))
    params = jax.device_put(params_of(model), shardings)
    with sharded_tracing(mesh):
        mesh_loss, _, on_mesh = loss_and_gradients(lambda params: model.apply({"params": params}, TOKENS_BT), params)
    np.testing.assert_allclose(mesh_loss, loss, rtol=1e-6)
    assert_same_gradients(on_mesh, gradients, 1e-5)


def test_ponder_by_chunks_of_tokens():
    """The same loss and gradients; neither forward nor backward holds all probabilities at once."""
    whole, chunked = (model_of("ponder", ponder_chunk_tokens=chunk_tokens) for chunk_tokens in (0, 4))
    loss, _, gradients = computed(whole)
    chunked_loss, _, chunked_gradients = computed(chunked)
    np.testing.assert_allclose(chunked_loss, loss, rtol=1e-6)
    assert_same_gradients(chunked_gradients, gradients, 1e-5)

    def held(model):
        hidden = lambda params: model.apply({"params": params}, TOKENS_BT, method="hidden")[0].sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(hidden))(params_of(model)))

    assert "[2,6,32]" in held(whole)
    assert "[2,3,32]" in held(chunked)
    assert not any(shape in held(chunked) for shape in ("[2,6,32]", "[2,2,3,32]"))


def test_probabilities_are_not_kept_for_the_backward_pass():
    """Of a pondering step no array of the vocabulary's size goes from the forward to the backward pass."""
    model = model_of("ponder")
    hidden = lambda params: model.apply({"params": params}, TOKENS_BT, method="hidden")[0].sum()  # noqa: E731
    kept = jax.eval_shape(lambda params: jax.vjp(hidden, params)[1], params_of(model))
    shapes = {leaf.shape for leaf in jax.tree.leaves(kept)}
    assert shapes and not any(VOCAB_SIZE in shape and len(shape) > 2 for shape in shapes)


@pytest.mark.parametrize("method", ["ponder", "loop"])
def test_layers_are_traced_as_often_however_many_passes(method, monkeypatch):
    """Scans keep the traced program the same for every N."""
    calls, attention = [], llama.self_attention
    monkeypatch.setattr(llama, "self_attention", lambda *a, **k: (calls.append(1), attention(*a, **k))[1])

    def traced(number):
        model = model_of(method, "llama", number)
        params = params_of(model)  # which traces layers as well
        calls.clear()
        program = str(jax.make_jaxpr(model.apply)({"params": params}, TOKENS_BT))
        return len(calls), program.count("dot_general")

    assert traced(3) == traced(9) != (0, 0)
