"""Attention for NVIDIA GPUs, as far as a machine without one can tell: numbers, programs, limits."""

import dataclasses
import functools
import re
import sys
import types

import jax
import jax.extend.backend
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention_mesh import MESHES, assert_close, make_mesh

from latentjax.errors import UserError
from latentjax.models.attention import XLA, xla_attention
from latentjax.models.attention_backend import AttentionRequest, choose, compute_capability
from latentjax.models.gpu_attention import (
    CUDNN,
    TOKAMAX,
    cudnn_attention,
    segment_starts,
    tokamax_attention,
    tokamax_kernel,
)
from latentjax.models.slots import ALL_SLOTS, SlotRange
from latentjax.training.programs import sharded_tracing

BACKENDS = {backend.name: backend for backend in (XLA, CUDNN, TOKAMAX)}
REQUEST = AttentionRequest("gpu", mask_documents=False, head_dim=64, dtype="bfloat16", compute_capability=(9, 0))
EVERY_SECOND = SlotRange(2, 1, 2)
GPUS = {
    (8, 0): ("NVIDIA A100-SXM4-80GB", 108),
    (9, 0): ("NVIDIA H100 80GB HBM3", 132),
    (10, 0): ("NVIDIA B200", 148),
}


class FakeGPU(types.SimpleNamespace):
    """What libraries ask of a device."""

    __hash__ = object.__hash__


@pytest.fixture
def lower_for(monkeypatch):
    """A function that lowers for a GPU of a compute capability which is not there."""

    def lower(capability, function, *arguments):
        kind, cores = GPUS[capability]
        gpu = FakeGPU(
            platform="gpu", device_kind=kind, core_count=cores, compute_capability="{}.{}".format(*capability)
        )
        monkeypatch.setattr(jax.extend.backend, "get_default_device", lambda: gpu)
        monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()

    return lower


def abstract_gpu(capability):
    """A mesh of one such GPU: jax makes Triton kernels for a kind of GPU."""
    kind, cores = GPUS[capability]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("all",), abstract_device=device))


def arrays(queried, num_slots, head_dim=8, batch_size=2, num_heads=4, num_kv_heads=2, dtype=np.float32):
    """Queries, keys, values, weights of the result, and rows of documents of uneven length."""
    rng = np.random.default_rng(0)
    num_queries = len(queried.indices(num_slots))
    sizes = [(num_queries, num_heads), (num_slots, num_kv_heads), (num_slots, num_kv_heads), (num_queries, num_heads)]
    made = [jnp.asarray(rng.standard_normal((batch_size, *size, head_dim)), dtype) for size in sizes]
    begins = rng.random((batch_size, num_slots)) < 0.05
    return *made, jnp.asarray(np.cumsum(begins, axis=1), jnp.int32)


def loss_and_gradients(attention, queried, masked):
    """A function of q, k, v, weights, segment ids that attends forward and backward, rematerialised as a layer is."""

    def loss(q, k, v, weights, segment_ids):
        segment_ids = segment_ids if masked else None
        attended = jax.checkpoint(functools.partial(attention, queried=queried))(q, k, v, segment_ids_BS=segment_ids)
        return jnp.sum((attended * weights).astype(jnp.float32)), attended

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)


@pytest.fixture
def reference_op():
    """tokamax's attention written out, which takes what its kernels take."""
    base = pytest.importorskip("tokamax._src.ops.attention.base")
    tokamax_kernel(None)  # for what it does besides
    return base.DotProductAttention()


def test_segment_starts():
    """Each slot's is where its run of ids begins."""
    ids = jnp.asarray([[1, 1, 2, 2, 2, 5], [3, 4, 5, 6, 6, 6], [0, 0, 0, 0, 0, 0]], jnp.int32)
    assert segment_starts(ids).tolist() == [[0, 0, 2, 2, 2, 5], [0, 1, 2, 3, 3, 3], [0] * 6]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queried", [ALL_SLOTS, EVERY_SECOND, SlotRange(4, 1, 3)], ids=str)
@pytest.mark.parametrize("num_slots", [128, 200])  # whole tiles, and not
def test_tokamax_sees_the_same_slots(reference_op, num_slots, queried, masked):
    """The bounds handed to its kernels say what XLA's attention masks: results and gradients agree."""
    arguments = arrays(queried, num_slots)
    attention = functools.partial(tokamax_attention, kernel=reference_op)
    actual = jax.jit(loss_and_gradients(attention, queried, masked))(*arguments)
    assert_close(actual, jax.jit(loss_and_gradients(xla_attention, queried, masked))(*arguments))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("queried", [ALL_SLOTS, EVERY_SECOND], ids=str)
def test_tokamax_over_a_mesh(reference_op, sizes, queried):
    """Each device runs the kernel on its part, documents and all."""
    arguments = arrays(queried, 128, batch_size=8)
    expected = jax.jit(loss_and_gradients(xla_attention, queried, True))(*arguments)
    with sharded_tracing(make_mesh(sizes)):
        attention = functools.partial(tokamax_attention, kernel=reference_op)
        assert_close(jax.jit(loss_and_gradients(attention, queried, True))(*arguments), expected)


@pytest.mark.parametrize("queried", [ALL_SLOTS, EVERY_SECOND], ids=str)
@pytest.mark.parametrize(("capability", "head_dim"), [((8, 0), 64), ((9, 0), 64), ((9, 0), 128), ((10, 0), 128)])
def test_tokamax_lowers_for_cuda(lower_for, capability, head_dim, queried):
    """Forward and backward are kernels: on Hopper and Blackwell Mosaic's, which hold no (Q, S) array; else Triton."""
    tokamax = pytest.importorskip("tokamax")
    mosaic = capability[0] == 9 or (capability[0] == 10 and tokamax.__version_info__ >= (0, 0, 17))
    kernel = tokamax_kernel(capability)
    arguments = arrays(queried, 384, head_dim=head_dim, dtype=jnp.bfloat16)
    attention = functools.partial(tokamax_attention, kernel=kernel)
    with abstract_gpu(capability):
        text = lower_for(capability, loss_and_gradients(attention, queried, True), *arguments)
    kernels = re.findall(r"@(mosaic_gpu_v2|__gpu\$xla.gpu.triton)\(", text)
    assert set(kernels) == {"mosaic_gpu_v2" if mosaic else "__gpu$xla.gpu.triton"}
    assert len(kernels) >= 2
    num_queries = len(queried.indices(384))
    quadratic = set(re.findall(rf"tensor<[0-9x]*{num_queries}x384x(\w+)>", text))
    assert quadratic <= (set() if mosaic else {"i1", "i8", "i32"})


def test_tokamax_leaves_the_command_line_alone(reference_op, monkeypatch):
    """Its options are absl's: unread, they would be looked for in sys.argv, and ours are not theirs."""
    from absl import flags

    flags.FLAGS.unparse_flags()
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "recipe.py"])
    kernel = tokamax_kernel((8, 0))
    assert flags.FLAGS.is_parsed()
    assert type(kernel).__name__ == "PallasTritonFlashAttention"
    assert type(tokamax_kernel((9, 0))).__name__ == "PallasMosaicGpuFlashAttention"
    assert type(tokamax_kernel((12, 0))).__name__ == "PallasTritonFlashAttention"


@pytest.fixture
def cudnn_by_xla(monkeypatch):
    """jax's attention, told to use cuDNN, computes the same by XLA."""
    by_cudnn = jax.nn.dot_product_attention

    def by_xla(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return by_cudnn(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)


@pytest.mark.parametrize("sizes", [{}, *MESHES[:2]], ids=str)
def test_cudnn_is_asked_for_causal_attention(cudnn_by_xla, sizes):
    """Scale, grouped queries and causality as the other backends have them, on a mesh too."""
    arguments = arrays(ALL_SLOTS, 32, batch_size=8)
    expected = jax.jit(loss_and_gradients(xla_attention, ALL_SLOTS, False))(*arguments)
    with sharded_tracing(make_mesh(sizes)):
        assert_close(jax.jit(loss_and_gradients(cudnn_attention, ALL_SLOTS, False))(*arguments), expected)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_cudnn_lowers_for_cuda(lower_for, head_dim):
    """To one call forward and one backward (forward again: rematerialised), causal, and no (slots, slots) array."""
    arguments = arrays(ALL_SLOTS, 320, head_dim=head_dim, dtype=jnp.bfloat16)
    text = lower_for((9, 0), loss_and_gradients(cudnn_attention, ALL_SLOTS, False), *arguments)
    assert re.findall(r"@__cudnn\$(\w+)\(", text) == ["fmhaSoftmax", "fmhaSoftmax", "fmhaSoftmaxBackward"]
    assert text.count(r"\22mask_type\22: \22CAUSAL\22") == 3
    assert "320x320" not in text


def test_cudnn_lowers_for_cuda_over_a_mesh(lower_for):
    """Each device's call is for its own rows and heads."""
    arguments = arrays(ALL_SLOTS, 320, head_dim=64, batch_size=8, dtype=jnp.bfloat16)
    with sharded_tracing(make_mesh({"fsdp": 4, "tensor": 2})):
        text = lower_for((9, 0), loss_and_gradients(cudnn_attention, ALL_SLOTS, False), *arguments)
    operands = re.findall(r"@__cudnn\$fmhaSoftmax\(.*: \((tensor<[^>]*>), (tensor<[^>]*>)", text)
    assert set(operands) == {("tensor<2x320x2x64xbf16>", "tensor<2x320x1x64xbf16>")}


def test_cudnn_refuses_what_it_cannot_say():
    """Callers are told, should they not have asked what it serves."""
    q, k, v, _, segment_ids = arrays(ALL_SLOTS, 32)
    with pytest.raises(ValueError, match="segments"):
        cudnn_attention(q, k, v, segment_ids_BS=segment_ids, queried=ALL_SLOTS)
    with sharded_tracing(make_mesh({"sequence": 2})), pytest.raises(ValueError, match="spread over devices"):
        jax.eval_shape(lambda: cudnn_attention(q, k, v, segment_ids_BS=None, queried=ALL_SLOTS))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cudnn"),
        ({"compute_capability": None}, "cudnn"),
        ({"mask_documents": True}, "tokamax"),
        ({"sequence_shards": 2}, "tokamax"),
        ({"dtype": "float32"}, "xla"),
        ({"head_dim": 160}, "xla"),
        ({"compute_capability": (7, 5)}, "xla"),
        ({"platform": "cpu", "compute_capability": None}, "xla"),
    ],
)
def test_auto_takes_the_best_that_serves(monkeypatch, changes, expected):
    """On GPU cuDNN, or tokamax where documents are kept apart or sequences spread."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    assert choose(BACKENDS, "auto", dataclasses.replace(REQUEST, **changes)).name == expected


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("cudnn", {"mask_documents": True}, r"'cudnn' cannot keep documents apart: set model\.attention=tokamax"),
        ("cudnn", {"sequence_shards": 2}, r"'cudnn' cannot spread a sequence over mesh\.sequence=2 devices"),
        ("cudnn", {"dtype": "float32"}, r"'cudnn' needs model\.dtype=bfloat16 or float16, not float32"),
        ("tokamax", {"head_dim": 160}, r"'tokamax' needs a head dimension .* at most 128, not 160"),
        ("cudnn", {"head_dim": 20}, r"'cudnn' needs a head dimension .* multiple of 8 .* not 20"),
        ("tokamax", {"compute_capability": (7, 5)}, r"compute capability 8\.0 or newer, but these have 7\.5"),
        ("cudnn", {"compute_capability": (0, 0)}, r"needs NVIDIA GPUs .* these are not NVIDIA's"),
        ("cudnn", {"platform": "cpu"}, r"'cudnn' serves gpu devices, but these are cpu: choose auto"),
        ("tokamax", {"platform": "tpu"}, r"'tokamax' serves gpu devices, but these are tpu"),
    ],
)
def test_what_is_asked_for_but_not_served_is_the_users_error(monkeypatch, name, changes, message):
    """One line that names the key and what to do; never another backend in its place."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    with pytest.raises(UserError, match=message) as caught:
        choose(BACKENDS, name, dataclasses.replace(REQUEST, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokamax", "auto"])
def test_absent_library_is_the_users_error(monkeypatch, name):
    """It says what to install; `auto` does not turn to something slower in silence."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the library tokamax: pip install 'latentjax\[gpu-masks\]'"):
        choose(BACKENDS, name, dataclasses.replace(REQUEST, mask_documents=True))


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (FakeGPU(platform="gpu", compute_capability="9.0"), (9, 0)),
        (FakeGPU(platform="gpu", compute_capability="12.1"), (12, 1)),
        (FakeGPU(platform="gpu", compute_capability="gfx942"), (0, 0)),
        (FakeGPU(platform="tpu"), None),
    ],
)
def test_compute_capability(device, expected):
    """Of NVIDIA's, of others' and of what is no GPU."""
    assert compute_capability(device) == expected
