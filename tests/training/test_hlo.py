"""The reader of compiled programs, on text of every kind that XLA writes, and the counts on programs that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import language_model, params_of

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.methods import make_recurrence
from latentjax.training.flops import forward_flops_per_slot, train_flops_per_token
from latentjax.training.hlo import device_groups, parse
from latentjax.training.hlo_costs import ProgramCosts, count_costs
from latentjax.training.step import summed_loss


def costs_of(body: str, *computations: str, num_partitions: int = 8) -> ProgramCosts:
    """Counts of a program whose entry has these lines."""
    others = "\n\n".join(computations)
    return count_costs(
        parse(f"HloModule m, num_partitions={num_partitions}\n\n{others}\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n")
    )


def groups_of(text: str) -> list[list[int]]:
    module = parse(
        "HloModule m, num_partitions=8\n\nENTRY %main () -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n"
        f"  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, {text}, use_global_device_ids=true, to_apply=%add\n}}\n"
    )
    return device_groups(module.entry.root, module.num_partitions).tolist()


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups={{0,1,2},{3}}", [[0, 1, 2], [3, -1, -1]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("source_target_pairs={{0,1},{1,2},{2,0}}", [[0, 1], [1, 2], [2, 0]]),
    ],
)
def test_groups_in_every_syntax(text: str, groups: list[list[int]]):
    assert groups_of(text) == groups


LOOP = """
%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %step = s32[] constant(STEP)
  %next = s32[] add(%i, %step)
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%next, %y)
}

%condition (p.1: (s32[], f32[8,8])) -> pred[] {
  %p.1 = (s32[], /*index=1*/f32[8,8]{1,0}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  %n = s32[] constant(LIMIT)
  ROOT %lt = pred[] compare(%i.1, %n), direction=LT
}"""
LOOP_ENTRY = """  %zero = s32[] constant(START)
  %first = s32[] copy(%zero)
  %x.1 = f32[8,8]{1,0} parameter(0)
  %start = (s32[], f32[8,8]{1,0}) tuple(%first, %x.1)
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%start), condition=%condition, body=%body"""


@pytest.mark.parametrize(
    ("start", "limit", "step", "behind", "trips"),
    [
        (0, 24, 1, "", 24),
        (3, 24, 1, "", 21),
        (0, 7, 2, "", 4),
        (0, 24, 1, ', backend_config={"known_trip_count":{"n":"5"},"x":1}', 5),
    ],
)
def test_loops_count_as_often_as_they_run(start: int, limit: int, step: int, behind: str, trips: int):
    loop = LOOP.replace("STEP", str(step)).replace("LIMIT", str(limit))
    costs = costs_of(LOOP_ENTRY.replace("START", str(start)) + behind, loop)
    assert costs.flops == trips * 2 * 8**3
    assert costs.hbm_bytes == 8 + trips * (12 + 3 * 256)  # the copy before; the counter and the product in each trip
    assert costs.unknown_loops == 0


def test_a_loop_that_does_not_count_is_reported():
    loop = LOOP.replace("STEP", "1").replace("constant(LIMIT)", "negate(%i.1)")
    costs = costs_of(LOOP_ENTRY.replace("START", "0"), loop)
    assert (costs.flops, costs.unknown_loops) == (2 * 8**3, 1)


def test_products_written_as_convolutions():
    """As XLA writes them on TPUs: plain, batched over positions, and over an axis of the kernel alone."""
    plain = """  %a = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c = bf16[16,64]{1,0} convolution(%a, %b), dim_labels=bf_io->bf"""
    costs = costs_of(plain)
    assert costs.flops == 2 * 16 * 32 * 64
    assert costs.hbm_bytes == 2 * (16 * 32 + 16 * 64)  # b lies inside the chip
    rows = """  %a = bf16[2,128,256]{2,1,0} parameter(0)
  %b = bf16[256,1024,1]{1,0,2} parameter(1)
  ROOT %c = bf16[2,128,1024]{2,1,0} convolution(%a, %b), window={size=1}, dim_labels=0bf_io0->0bf"""
    assert costs_of(rows).flops == 2 * 2 * 128 * 256 * 1024
    qkv = """  %a = bf16[1,2,128,256,1]{3,2,1,0,4} parameter(0)
  %b = bf16[3,256,2,128,1]{3,1,0,2,4} parameter(1)
  ROOT %c = bf16[2,128,3,128,2]{3,1,0,2,4} convolution(%a, %b), window={size=3x1x2 pad=2_2x0_0x1_1 rhs_reversal=1x0x1}, dim_labels=01bf2_0i2o1->1b0f2"""  # noqa: E501
    assert costs_of(qkv).flops == 2 * (2 * 128) * 256 * (3 * 2 * 128)
    batched = """  %a = bf16[4,128,64]{2,1,0} parameter(0)
  %b = bf16[4,32,64]{2,1,0} parameter(1)
  ROOT %c = bf16[4,128,32]{2,1,0} convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf"""
    assert costs_of(batched).flops == 2 * 4 * 128 * 32 * 64


def test_of_a_stack_of_layers_only_the_slice_is_moved():
    take = """%take (s: f32[24,64], i: s32[]) -> f32[1,64] {
  %s = f32[24,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %d = f32[1,64]{1,0} dynamic-slice(%s, %i, %zero), dynamic_slice_sizes={1,64}
}"""
    put = """%put (s: f32[24,64], u: f32[1,64], i: s32[]) -> f32[24,64] {
  %s = f32[24,64]{1,0} parameter(0)
  %u = f32[1,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %d = f32[24,64]{1,0} dynamic-update-slice(%s, %u, %i, %zero)
}"""
    entry = """  %stack = f32[24,64]{1,0} parameter(0)
  %i.1 = s32[]{:S(6)} parameter(1)
  %one = f32[1,64]{1,0} fusion(%stack, %i.1), kind=kLoop, calls=%take
  ROOT %new = f32[24,64]{1,0} fusion(%stack, %one, %i.1), kind=kLoop, calls=%put"""
    row, index = 64 * 4, 4  # bytes; each fusion reads its index
    assert costs_of(entry, take, put).hbm_bytes == 4 * row + 2 * index


ASYNC = """%start (p: bf16[1,128]) -> (bf16[1,128], bf16[4,128], u32[]) {
  %p = bf16[1,128]{1,0} parameter(0)
  %g = bf16[4,128]{1,0} all-gather(%p), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %c = (bf16[1,128]{1,0}, bf16[4,128]{1,0}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%done (p.1: bf16[1,128], b: bf16[4,128], f: u32[]) -> bf16[4,128] {
  %p.1 = bf16[1,128]{1,0} parameter(0)
  %b = bf16[4,128]{1,0} parameter(1)
  %f = u32[]{:S(2)} parameter(2)
  %g.1 = bf16[4,128]{1,0} all-gather(%p.1), channel_id=8, replica_groups=[2,4]<=[8], dimensions={0}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %c.1 = bf16[4,128]{1,0} custom-call(%p.1, %b, %g.1, %f), custom_call_target="AsyncCollectiveDone"
}"""  # noqa: E501


def test_an_asynchronous_collective_counts_once():
    pair = """  %p.2 = f32[16]{0} parameter(0)
  %s = (f32[16]{0}, f32[64]{0}) all-gather-start(%p.2), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %d = f32[64]{0} all-gather-done(%s)"""
    fused = """  %p.2 = bf16[1,128]{1,0} parameter(0)
  %s = (bf16[1,128]{1,0}, bf16[4,128]{1,0}, u32[]{:S(2)}) fusion(%p.2), kind=kCustom, calls=%start
  %a = bf16[1,128]{1,0} get-tuple-element(%s), index=0
  %o = bf16[4,128]{1,0} get-tuple-element(%s), index=1
  %u = u32[]{:S(2)} get-tuple-element(%s), index=2
  ROOT %d = bf16[4,128]{1,0} fusion(%a, %o, %u), kind=kCustom, calls=%done"""
    for costs, sent in ((costs_of(pair), 3 / 4 * 256), (costs_of(fused, ASYNC), 3 / 4 * 1024)):
        assert [(each.kind, each.count, each.sent) for each in costs.collectives] == [("all-gather", 1, sent)]
    assert costs_of(fused, ASYNC).hbm_bytes == 256 + 1024  # reads its part, writes the whole


def test_a_reduce_scatter_written_as_a_reduction_of_which_a_slice_is_kept():
    scatter = """%all-reduce-scatter (a: f32[64,8], b: f32[8]) -> (f32[16,8], f32[2]) {
  %a = f32[64,8]{1,0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %r = (f32[64,8]{1,0}, f32[8]{0}) all-reduce(%a, %b), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %r0 = f32[64,8]{1,0} get-tuple-element(%r), index=0
  %r1 = f32[8]{0} get-tuple-element(%r), index=1
  %i = u32[] constant(0)
  %s0 = f32[16,8]{1,0} dynamic-slice(%r0, %i, %i), dynamic_slice_sizes={16,8}
  %s1 = f32[2]{0} dynamic-slice(%r1, %i), dynamic_slice_sizes={2}
  ROOT %t = (f32[16,8]{1,0}, f32[2]{0}) tuple(%s0, %s1)
}"""
    entry = """  %p = f32[64,8]{1,0} parameter(0)
  %q = f32[8]{0} parameter(1)
  ROOT %f = (f32[16,8]{1,0}, f32[2]{0}) fusion(%p, %q), kind=kCustom, calls=%all-reduce-scatter"""
    (collective,) = costs_of(entry, scatter).collectives
    assert (collective.kind, collective.sent) == ("reduce-scatter", 3 / 4 * 4 * (64 * 8 + 8))


def test_collectives_between_slices_are_sends():
    send = """  %p = f32[32,8,128]{2,1,0} parameter(0)
  %token = token[] after-all()
  %r = (f32[32,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %s = (f32[32,8,128]{2,1,0}, u32[], token[]) send(%p, %token), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}"""  # noqa: E501
    (collective,) = costs_of(send).collectives
    assert (collective.kind, collective.num_slices) == ("all-reduce", 4)
    assert collective.sent == 2 * 3 / 4 * 32 * 8 * 128 * 4


def test_attention_kernels_are_charged_for_what_causality_leaves():
    """Attributes go on over several lines, as XLA writes those of kernels."""
    call = """  %q = bf16[2,4,128,64]{3,2,1,0} parameter(0)
  %k = bf16[2,4,256,64]{3,2,1,0} parameter(1)
  %m = s8[1,1,1]{2,1,0} parameter(2)
  %splash_mha_fwd.1 = bf16[2,4,128,64]{3,2,1,0} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"x":"{\\"block_q\\": 128}"
}}, metadata={op_name="attention"}
  ROOT %splash_mha_dkv.2 = bf16[2,4,256,64]{3,2,1,0} custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"
"""  # noqa: E501
    costs = costs_of(call)
    assert costs.flops == costs.kernel_flops == (2 + 4) * 2 * (2 * 4 * 128 * 256) * 64 / 2


def test_a_scanned_sharded_product():
    """Six layers of a matrix sharded 4 ways, on a batch sharded 8 ways: all that is computed and sent is known."""
    layers, width, rows = 6, 64, 32
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def sharding(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    def loss(w_NDD, x_BD):
        def layer(x_BD, w_DD):
            return jax.lax.with_sharding_constraint(jnp.tanh(x_BD @ w_DD), sharding(("data", "fsdp"), None)), None

        return jnp.sum(jax.lax.scan(layer, x_BD, w_NDD)[0] ** 2)

    w_NDD = jax.ShapeDtypeStruct((layers, width, width), jnp.float32, sharding=sharding(None, "fsdp", None))
    x_BD = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=sharding(("data", "fsdp"), None))
    compiled = jax.jit(jax.grad(loss), out_shardings=w_NDD.sharding).lower(w_NDD, x_BD).compile()
    costs = count_costs(parse(compiled.as_text()))

    assert costs.flops == 3 * layers * 2 * (rows // 8) * width * width
    matrix = 4 * width * width
    gathers = [each for each in costs.collectives if each.kind == "all-gather"]
    assert sum(each.count for each in gathers) == 2 * layers  # forward and backward
    assert sum(each.sent for each in gathers) == 2 * layers * 3 / 4 * matrix
    assert all(np.array_equal(each.groups, [[0, 1, 2, 3], [4, 5, 6, 7]]) for each in gathers)
    assert all(each.shapes[0].sizes == (width // 4, width) for each in gathers)
    # On CPUs gradients are reduced over fsdp whole, and then over data what each device keeps.
    reductions = {tuple(each.groups[0]): each.sent for each in costs.collectives if each.kind == "all-reduce"}
    assert reductions[0, 1, 2, 3] == layers * 2 * 3 / 4 * matrix
    assert reductions[0, 4] == layers * 2 * 1 / 2 * matrix / 4


def program_flops(num_thoughts: int, num_iterations: int, *, trains: bool = True, **changes) -> tuple[float, ModelSpec]:
    """FLOPs of a tiny model's loss, or of its gradient, as compiled, per token; and the model's spec."""
    model = language_model(num_thoughts, num_layers=3, **changes)
    batch = {
        "tokens": jax.ShapeDtypeStruct((4, 17), jnp.int32),
        "loss_weights": jax.ShapeDtypeStruct((4, 16), jnp.float32),
    }

    def loss(params, batch):
        return summed_loss(model, params, batch, num_iterations, 0)[0]

    lowered = jax.jit(jax.grad(loss) if trains else loss).lower(jax.eval_shape(lambda: params_of(model)), batch)
    costs = count_costs(parse(lowered.compile().as_text()))
    assert costs.unknown_loops == 0
    return costs.flops / (4 * 16), model.spec


def test_a_model_computes_its_model_flops_and_what_remat_recomputes():
    flops, spec = program_flops(0, 0)
    recurrence = make_recurrence(language_model(0).recurrence_spec)
    # One chunk of queries computes the masked half of attention too.
    masked_half = 2.0 * spec.num_heads * spec.head_dim * 16 * spec.num_layers
    assert flops == train_flops_per_token(spec, recurrence, 16, 0) + 3 * masked_half
    # A layer's forward once more, but for the products at its two ends, whose results nothing needs.
    ends = 2.0 * spec.num_layers * spec.hidden_size * (spec.hidden_size + spec.intermediate_size)
    again = forward_flops_per_slot(spec, 16) + masked_half - ends
    assert program_flops(0, 0, remat="keep_layer_inputs")[0] == flops + again


def test_a_refinement_pass_more_costs_a_pass_more():
    (two, spec), (three, _), (four, _) = (program_flops(1, iterations, trains=False) for iterations in (2, 3, 4))
    assert four - three == three - two
    masked_half = 2.0 * spec.num_heads * spec.head_dim * 32 * spec.num_layers
    whole_pass = 2 * (forward_flops_per_slot(spec, 32) + masked_half)
    assert 0.8 * whole_pass < three - two <= whole_pass  # its last layer need not work on every slot
