"""How `model.loops` is resolved."""

import pytest

from latentjax.models.loops import choose_loops


@pytest.mark.parametrize(
    ("name", "platform", "num_layers", "chosen"),
    [
        ("auto", "cpu", 6, "unrolled"),
        ("auto", "cpu", 24, "rolled"),
        ("auto", "tpu", 6, "rolled"),
        ("auto", "gpu", 6, "rolled"),
        ("unrolled", "tpu", 24, "unrolled"),
        ("rolled", "cpu", 2, "rolled"),
    ],
)
def test_small_models_on_the_cpu_are_unrolled(name: str, platform: str, num_layers: int, chosen: str):
    assert choose_loops(name, platform, num_layers) == chosen
