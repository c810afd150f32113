"""Every option is one that the compilers know, and none changes a number on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from latentjax.training.compiler_options import options_for


def lowered(devices) -> jax.stages.Lowered:
    """A matrix product whose operand is gathered."""
    mesh = Mesh(np.array(devices), ("fsdp",))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    x, w = (jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=rows) for _ in range(2))
    return jax.jit(lambda x, w: jnp.tanh(x @ w), out_shardings=rows).lower(x, w)


def test_a_name_that_is_not_known_is_an_error():
    """Or else these tests would show nothing."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
        lowered(jax.devices()).compile(compiler_options={"xla_no_such_option": True})


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_options_that_every_build_of_xla_parses(platform: str):
    program = lowered(jax.devices())
    assert options_for("gpu")
    for name, value in options_for(platform).items():
        assert program.compile(compiler_options={name: value}), name


@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v5e:2x2"])
def test_options_that_the_tpu_compiler_takes(tpu_topology, topology: str):
    program = lowered(tpu_topology(topology).devices)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_no_such_option'"):
        program.compile(compiler_options={"xla_tpu_no_such_option": True})
    assert options_for("tpu")
    assert program.compile(compiler_options=options_for("tpu"))


def test_options_are_those_of_the_platform():
    """A copy of them each time; a platform that nothing is known of has none."""
    options = options_for("tpu")
    options["more"] = True
    assert "more" not in options_for("tpu")
    assert options_for("cpu") == options_for("metal") == {}
    assert not any(name.startswith("xla_gpu") for name in options_for("tpu"))
    assert all(name.startswith("xla_gpu") for name in options_for("gpu"))
