"""Costs against the operations that XLA counts in compiled programs, and how they are told."""

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from latentjax.config import default
from latentjax.recurrence.methods import make_recurrence
from latentjax.training import programs
from latentjax.training.cost import Cost, cost_lines, cost_of, costs_as_json
from latentjax.training.flops import causal_attention_flops
from latentjax.training.mesh import make_mesh
from latentjax.training.optimizer import make_optimizer
from latentjax.training.state import abstract_state

LENGTH, ROWS = 32, 64

# Each method and each architecture; matrices are large beside what norms, softmax and the optimizer do.
CASES = [
    ("vanilla", 0, "gpt_neox"),
    ("latent", 1, "llama"),
    ("ponder", 2, "gpt2"),
    ("loop", 1, "gpt_neox"),
    ("pause", 2, "llama"),
]


def config_of(method: str, number: int, architecture: str) -> ConfigDict:
    config = default()
    config.model.update(
        architecture=architecture, num_layers=2, hidden_size=256, num_heads=4, intermediate_size=640, vocab_size=512,
        max_position_embeddings=LENGTH, dtype="float32", attention="xla", loops="unrolled",
        rotary_fraction={"gpt_neox": 0.25, "llama": 1.0, "gpt2": 0.0}[architecture],
        tie_embeddings=architecture == "gpt2", num_kv_heads=2 if architecture == "llama" else 0,
    )  # fmt: skip
    config.recurrence.update(method=method, num_latent_thoughts=number, train_jacobi_iterations=(1,))
    config.data.update(sequence_length=LENGTH, batch_size=ROWS)
    return config


def counted(lowered: jax.stages.Lowered) -> float:
    """The operations of the compiled program, as XLA counts them: those in a loop once."""
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.parametrize(("method", "number", "architecture"), CASES)
def test_flops_are_those_that_xla_counts(method: str, number: int, architecture: str):
    """Of a train step and of decoding a token: the products, and beside them a few percent of everything else."""
    config = config_of(method, number, architecture)
    cost, mesh = cost_of(config), make_mesh(config, jax.devices()[:1])
    model = programs.make_model(config, mesh)
    state = abstract_state(model, make_optimizer(config.optimizer, config.train.num_steps), mesh)
    spec, recurrence = model.spec, make_recurrence(model.recurrence_spec)

    def attention(num_scores: float) -> float:
        """As much again as is counted: so short a sequence is one chunk of queries, which meets all keys, not half."""
        return causal_attention_flops(spec.num_heads * num_scores, spec.head_dim)

    passes = zip(recurrence.passes(1), recurrence.kept_slots(1), strict=True)
    scores = LENGTH * sum(slots * ((spec.num_layers - 1) * slots + kept) for slots, kept in passes)
    step = counted(programs.lower_train_step(config, model, mesh, state, programs.schedule_of(config).works[0]))
    assert 0.99 < step / (ROWS * LENGTH * (cost.train_flops + 3 * attention(scores))) < 1.05

    cache = jax.eval_shape(lambda: model.apply({}, ROWS, LENGTH, method="empty_cache"))
    ids_B = jax.ShapeDtypeStruct((ROWS,), jnp.int32)
    decode = jax.jit(lambda params, ids, cache: model.apply({"params": params}, ids, ids, cache, method="decode"))
    scores = recurrence.forwards_per_token * spec.num_layers * recurrence.slots_per_token * LENGTH
    flops = cost.decode_flops + attention(scores)
    assert 0.99 < counted(decode.lower(state.params, ids_B, cache)) / (ROWS * flops) < 1.05


@pytest.mark.parametrize("architecture", ["gpt_neox", "gpt2"])
def test_parameters_are_those_of_the_model(architecture: str):
    """Tables of tokens and positions, and a head that is not tied, apart."""
    config = config_of("latent", 1, architecture)
    model = programs.make_model(config, make_mesh(config, jax.devices()[:1]))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    cost = cost_of(config)
    tables = 512 * 256 + (LENGTH * 256 if architecture == "gpt2" else 512 * 256)
    assert cost.table_parameters == tables
    assert cost.layer_parameters == sum(leaf.size for leaf in jax.tree.leaves(params)) - tables


def test_means_over_the_draws_of_r():
    """As often as each is drawn; methods that do not iterate have one program and one cost."""
    config = config_of("latent", 1, "llama")
    costs = []
    for drawn in ((2,), (3,), (2, 3), (3, 2, 2)):
        config.recurrence.train_jacobi_iterations = drawn
        costs.append(cost_of(config))
    two, three, both, thrice = costs
    assert (two.train_forwards, three.train_forwards, both.train_forwards) == (7, 9, 8)
    assert both.train_flops == pytest.approx((two.train_flops + three.train_flops) / 2)
    assert thrice.train_flops == pytest.approx((2 * two.train_flops + three.train_flops) / 3)
    assert both.total_train_flops == pytest.approx(both.train_flops * config.train.num_steps * ROWS * LENGTH)
    config.recurrence.method = "loop"
    assert cost_of(config).train_forwards == cost_of(config).decode_forwards == 2


def test_twice_the_depth_and_a_second_run_cost_the_same():
    """But for the parameters of the layers."""
    vanilla, loop = config_of("vanilla", 0, "llama"), config_of("loop", 1, "llama")
    vanilla.model.num_layers *= 2
    ratios = cost_of(vanilla).ratios(cost_of(loop))
    for name in ("train_flops", "decode_flops", "cache_bytes", "table_parameters"):
        assert ratios[name] == pytest.approx(1), name
    assert ratios["layer_parameters"] == pytest.approx(2, abs=0.001)
    assert ratios["decode_forwards"] == 0.5


def test_lines_and_json():
    """One line for each config, with the ratios to the first."""
    one = Cost(1000, 24, 1.0, 1, 3e3, 1e3, 512, 6e9)
    other = Cost(1000, 24, 8.0, 2, 24e3, 2.5e3, 1024, 48e9)
    lines = cost_lines(["a.py", "b.py:latent"], [one, other])
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert lines[3].split() == [
        "b.py:latent", "1,000", "24", "8", "2", "2.400e+04", "(8.00)", "2.500e+03", "(2.50)", "1,024", "(2.00)",
        "4.800e+10", "(8.00)",
    ]  # fmt: skip
    first, second = costs_as_json(["a.py", "b.py:latent"], [one, other])
    assert set(first["ratios"].values()) == {1.0}
    assert second["config"] == "b.py:latent" and second["decode_flops"] == 2500.0
    assert second["ratios"]["train_flops"] == 8.0


def test_means_over_the_stages_of_training():
    """Each stage for as long as it takes; over a hand-over, half of the steps are of either."""
    config = config_of("latent", 2, "llama")
    # Token-forwards: 1; 3 and 5; 9.
    stages = ((0.0, 0, (0,)), (0.5, 1, (0, 1)), (0.8, 2, (1,)))
    config.recurrence.train_schedule = stages
    assert cost_of(config).train_forwards == pytest.approx(0.5 * 1 + 0.3 * 4 + 0.2 * 9)
    config.recurrence.handover_ratio = 0.1
    assert cost_of(config).train_forwards == pytest.approx(0.55 * 1 + 0.3 * 4 + 0.15 * 9)
    alone = []
    for _, number, drawn in stages:
        config.recurrence.update(train_schedule=((0.0, number, drawn),), handover_ratio=0.0)
        alone.append(cost_of(config))
    config.recurrence.update(train_schedule=stages, handover_ratio=0.1)
    flops = sum(share * each.train_flops for share, each in zip((0.55, 0.3, 0.15), alone, strict=True))
    assert cost_of(config).train_flops == pytest.approx(flops)
    assert cost_of(config).total_train_flops == pytest.approx(flops * config.train.num_steps * ROWS * LENGTH)
    # What it costs to use is what a model with all thoughts costs; a stage without any costs what vanilla does.
    assert cost_of(config).decode_forwards == 3
    assert alone[0].train_flops == cost_of(config_of("vanilla", 0, "llama")).train_flops
