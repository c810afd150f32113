"""Mesh shapes and their errors, and which shard of what lies where."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import language_model

from latentjax.config import default
from latentjax.errors import UserError
from latentjax.training.mesh import AXES, check_divisible, check_slices, make_mesh, mesh_shape, put_batch
from latentjax.training.optimizer import make_optimizer
from latentjax.training.state import abstract_state, create_state


def config_with(batch_size=8, accumulation=1, **mesh):
    config = default()
    config.model.update(hidden_size=16, num_heads=4, num_kv_heads=0, intermediate_size=24, vocab_size=32)
    config.data.update(batch_size=batch_size, sequence_length=12)
    config.train.gradient_accumulation_steps = accumulation
    config.mesh.update({"data": 1, **mesh})
    return config


@pytest.mark.parametrize(
    ("mesh", "num_devices", "shape"),
    [
        ({}, 1, (1, 1, 1, 1, 1)),
        ({"data": -1}, 8, (1, 8, 1, 1, 1)),
        ({"fsdp": -1, "tensor": 2}, 8, (1, 1, 4, 1, 2)),
        ({"replica": 2, "data": 2, "sequence": 2}, 8, (2, 2, 1, 2, 1)),
        ({"data": -1, "fsdp": 8}, 8, (1, 1, 8, 1, 1)),
    ],
)
def test_shape(mesh, num_devices, shape):
    """-1 takes the devices that are left."""
    assert mesh_shape(config_with(**mesh).mesh, num_devices) == shape


@pytest.mark.parametrize(
    ("mesh", "num_devices", "pattern"),
    [
        ({"data": 4}, 8, r"\(data=4\) needs 4 devices, but there are 8"),
        ({"fsdp": 4, "tensor": 4}, 8, r"\(fsdp=4, tensor=4\) needs 16 devices, but there are 8"),
        ({"data": -1, "tensor": 3}, 8, r"\(data=-1, tensor=3\) needs a multiple of 3 devices, but there are 8"),
        ({}, 2, r"\(all 1\) needs 1 devices, but there are 2"),
    ],
)
def test_shape_that_does_not_fit_the_devices(mesh, num_devices, pattern):
    """Says what was asked for, what there is, and how to mend it."""
    with pytest.raises(UserError, match=pattern + ".*-1 to take the rest"):
        mesh_shape(config_with(**mesh).mesh, num_devices)


@pytest.mark.parametrize(
    ("change", "mesh", "pattern"),
    [
        ({"batch_size": 6}, {"data": 2, "fsdp": 2}, r"data\.batch_size.*is 6, which mesh\.replica \* .* = 4"),
        ({"accumulation": 4}, {"data": 4}, r"data\.batch_size / train\.gradient_accumulation_steps is 2, .* = 4"),
        ({}, {"sequence": 8}, r"data\.sequence_length is 12, which mesh\.sequence = 8"),
        ({"hidden_size": 12}, {"fsdp": 8}, r"model\.hidden_size is 12, which mesh\.fsdp = 8"),
        ({}, {"tensor": 8}, r"model\.num_heads is 4, which mesh\.tensor = 8"),
        ({"num_kv_heads": 2}, {"tensor": 4}, r"model\.num_kv_heads is 2, which mesh\.tensor = 4"),
        ({"intermediate_size": 26}, {"tensor": 4}, r"model\.intermediate_size is 26, which mesh\.tensor = 4"),
    ],
)
def test_sizes_that_do_not_divide(change, mesh, pattern):
    """Names the size and the axis."""
    in_model = {key: value for key, value in change.items() if key not in ("batch_size", "accumulation")}
    config = config_with(**{key: value for key, value in change.items() if key not in in_model}, **mesh)
    config.model.update(in_model)
    shape = [config.mesh[axis] for axis in AXES]
    with pytest.raises(UserError, match=pattern + " does not divide: change one of them"):
        check_divisible(config, shape)
    check_divisible(config_with(), [1] * 5)


def test_vocabulary_that_does_not_divide():
    """Says what to raise it to."""
    config = config_with()
    config.model.vocab_size = 257
    with pytest.raises(UserError, match=r"model\.vocab_size is 257, which mesh\.tensor = 4 .* raise it to 260, or"):
        check_divisible(config, (1, 1, 1, 1, 4))
    config.model.vocab_size = 260
    check_divisible(config, (1, 1, 1, 1, 4))


@dataclasses.dataclass(frozen=True)
class StandInChip:
    """What the arrangement of devices asks of one."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


def chips(num_slices, platform="tpu"):
    """Slices of 2 x 2 x 1 chips, in an order that mixes them."""
    places = [(x, y, 0) for y in range(2) for x in range(2)]
    made = [
        StandInChip(4 * index + number, index, place, platform)
        for number, place in enumerate(places)
        for index in range(num_slices)
    ]
    return made if platform == "tpu" else sorted(made, key=lambda chip: chip.id)


@pytest.mark.parametrize(
    ("num_slices", "mesh"),
    [
        (2, {"replica": 2, "fsdp": 4}),
        (2, {"replica": 4, "fsdp": 2}),
        (2, {"replica": -1, "tensor": 2, "sequence": 2}),
        (4, {"replica": 4, "data": 2, "fsdp": -1}),
    ],
)
def test_slices_lie_along_the_replica_axis(num_slices, mesh):
    """Each slice is a block of it: no other axis leaves a slice."""
    made = make_mesh(config_with(batch_size=16, **mesh), chips(num_slices))
    per_slice = made.shape["replica"] // num_slices
    slice_of = np.vectorize(lambda chip: chip.slice_index)(made.devices)
    for replica, block in enumerate(slice_of):
        assert set(block.flat) == {replica // per_slice}
    assert {chip.id for chip in made.devices.flat} == set(range(4 * num_slices))


@pytest.mark.parametrize(
    ("num_slices", "mesh", "needed"),
    [(2, {"fsdp": 8}, 2), (2, {"data": -1}, 2), (4, {"replica": 2, "fsdp": 8}, 4)],
)
def test_slices_that_replicas_do_not_spread_over(num_slices, mesh, needed):
    """Says what mesh.replica must be."""
    config = config_with(batch_size=16, **mesh)
    pattern = rf"in {num_slices} slices, over which mesh\.replica=\d does not spread: set mesh\.replica={needed} or"
    with pytest.raises(UserError, match=pattern):
        make_mesh(config, chips(num_slices))
    with pytest.raises(UserError, match="the slices have 4, 3 devices"):
        check_slices((1, 7, 1, 1, 1), [4, 3])


def test_nodes_of_gpus_are_no_slices():
    """They carry the same attribute, but a mesh may be sharded over them; the innermost axes stay in a node."""
    made = make_mesh(config_with(fsdp=4, tensor=2), chips(2, "gpu"))
    node_of = np.vectorize(lambda chip: chip.slice_index)(made.devices)
    np.testing.assert_array_equal(node_of[0, 0, :, 0], [[0, 0], [0, 0], [1, 1], [1, 1]])


def test_two_slices_of_tpu(tpu_topology):
    """As the TPU compiler describes them."""
    devices = tpu_topology("v5p:2x2x1", num_slices=2).devices
    made = make_mesh(config_with(replica=2, fsdp=2, tensor=2), devices)
    assert [{chip.slice_index for chip in block.flat} for block in made.devices] == [{0}, {1}]
    with pytest.raises(UserError, match=r"set mesh\.replica=2"):
        make_mesh(config_with(fsdp=8), devices)


def test_axes_that_cut_a_torus(tpu_topology):
    """fsdp=32 has no whole dimensions of 4 x 4 x 4 chips to itself beside tensor=2."""
    devices = tpu_topology("v5p:4x4x4").devices
    config = config_with(batch_size=32, fsdp=32, tensor=2)
    config.model.hidden_size = 64
    assert make_mesh(config, devices).devices.shape == (1, 1, 32, 1, 2)


@pytest.fixture(scope="module")
def states():
    """The same initial state made on three meshes, and the meshes."""
    model = language_model(1, "llama", vocab_size=32, num_heads=4, num_kv_heads=2)
    optimizer = make_optimizer(default().optimizer, 10)
    made = {}
    for name, mesh_config in {"one": {}, "fsdp": {"fsdp": 8}, "mixed": {"fsdp": 4, "tensor": 2}}.items():
        devices = jax.devices()[: 8 if mesh_config else 1]
        mesh = make_mesh(config_with(**mesh_config), devices)
        made[name] = (mesh, create_state(model, optimizer, mesh, 5), abstract_state(model, optimizer, mesh))
    return made


def test_state_is_the_same_on_every_mesh(states):
    """Bit for bit, so that a comparison of meshes compares nothing else."""
    _, expected, _ = states["one"]
    assert int(expected.step) == 0
    for name in ("fsdp", "mixed"):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), states[name][1], expected
        )


def test_shards_follow_the_rules(states):
    """fsdp=4 splits D, tensor=2 splits heads, F and V; the optimizer's moments lie with their parameters."""
    _, state, abstract = states["mixed"]
    expected = {  # D=16, H=4, G=2, K=4, F=24, V=32, two layers
        "embedding/embedding": (16, 4),
        "head/kernel": (4, 16),
        "backbone/final_norm/scale": (16,),
        "backbone/layers/input_norm/scale": (1, 16),
        "backbone/layers/mlp_norm/scale": (1, 16),
        "backbone/layers/query/kernel": (1, 4, 2, 4),
        "backbone/layers/key/kernel": (1, 4, 1, 4),
        "backbone/layers/value/kernel": (1, 4, 1, 4),
        "backbone/layers/attention_out/kernel": (1, 2, 4, 4),
        "backbone/layers/mlp_gate/kernel": (1, 4, 12),
        "backbone/layers/mlp_up/kernel": (1, 4, 12),
        "backbone/layers/mlp_out/kernel": (1, 12, 4),
        "backbone/last_layer/input_norm/scale": (16,),
        "backbone/last_layer/mlp_norm/scale": (16,),
        "backbone/last_layer/query/kernel": (4, 2, 4),
        "backbone/last_layer/key/kernel": (4, 1, 4),
        "backbone/last_layer/value/kernel": (4, 1, 4),
        "backbone/last_layer/attention_out/kernel": (2, 4, 4),
        "backbone/last_layer/mlp_gate/kernel": (4, 12),
        "backbone/last_layer/mlp_up/kernel": (4, 12),
        "backbone/last_layer/mlp_out/kernel": (12, 4),
    }
    moments = next(part for part in state.opt_state if hasattr(part, "mu"))
    for tree in (state.params, moments.mu, moments.nu):
        flat = flatten_dict(tree, sep="/")
        assert {name: leaf.addressable_shards[0].data.shape for name, leaf in flat.items()} == expected
        assert all(len(leaf.addressable_shards) == 8 for leaf in flat.values())
    for leaf, plan in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)


def test_moments_start_at_zero(states):
    """On every mesh."""
    for _, state, _ in states.values():
        moments = next(part for part in state.opt_state if hasattr(part, "mu"))
        assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves((moments.mu, moments.nu)))


def test_put_batch_spreads_rows(states):
    """Over the batch axes, whole rows; the axes of the model hold copies."""
    mesh, _, _ = states["mixed"]
    rows = np.arange(8 * 13, dtype=np.int32).reshape(8, 13)
    array = put_batch({"tokens": rows}, mesh)["tokens"]
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 13)}
    assert len({shard.index[0].start for shard in array.addressable_shards}) == 4
