"""The verb report: what configs cost, on one page or as JSON; every mistake in one line."""

import json

import pytest
import recipes

from latentjax.errors import UserError
from latentjax.report import main

LATENT, VANILLA = f"{recipes.RECIPE}:latent", f"{recipes.RECIPE}:vanilla"


def test_costs_side_by_side(capsys):
    """Flags for knobs hold for all configs."""
    assert main(["--cost", VANILLA, LATENT, "--config.recurrence.num_latent_thoughts=2", "--json"]) == 0
    vanilla, latent = json.loads(capsys.readouterr().out)
    assert (vanilla["config"], latent["config"]) == (VANILLA, LATENT)
    assert (vanilla["decode_forwards"], latent["decode_forwards"]) == (1, 3)
    assert latent["train_forwards"] == (3 + 6 + 3 + 9) / 2  # R is 1 or 2
    assert latent["ratios"]["cache_bytes"] == 3
    # Two layers of 2 K and V, of 2 heads of 8, in float32.
    assert vanilla["cache_bytes"] == 2 * 2 * 16 * 4
    assert main(["--cost", VANILLA, LATENT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "(1.00)" in lines[2] and lines[3].startswith(LATENT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to report on"),
        (["--cost"], "--cost"),
        (["--cost", "no/such.py"], "no recipe at 'no/such.py'"),
        (["--cost", LATENT, "--config.model.num_layers=0"], "model.num_layers=0"),
        (["--cost", LATENT, "--config.model.num_layer=1"], "did you mean 'model.num_layers'"),
        (["--cost", "configs/compare.py:big-loop"], "or small- before it, not 'big-loop'"),
    ],
)
def test_mistakes(arguments, message, monkeypatch):
    monkeypatch.chdir(recipes.ROOT)
    with pytest.raises(UserError) as caught:
        main(arguments)
    assert message in str(caught.value)


def test_methods_of_the_comparison_cost_the_same_in_decoding(monkeypatch, capsys):
    """But for the attention of more slots, and what ponder does with the vocabulary; on the same tokens."""
    monkeypatch.chdir(recipes.ROOT)
    names = ("vanilla_2x", "latent", "loop", "pause", "ponder", "vanilla")
    for size in ("", "410m-", "small-"):
        main(["--json", "--cost", *(f"configs/compare.py:{size}{name}" for name in names)])
        *costs, vanilla = json.loads(capsys.readouterr().out)
        for cost in costs:
            assert cost["ratios"]["decode_flops"] == pytest.approx(1, abs=0.15), cost["config"]
            assert cost["ratios"]["cache_bytes"] == 1
        # The same models but for the depth, and what they are trained on.
        assert len({cost["layer_parameters"] for cost in costs[1:]} | {vanilla["layer_parameters"]}) == 1
        tokens = {round(cost["total_train_flops"] / cost["train_flops"]) for cost in [*costs, vanilla]}
        assert tokens == {{"small-": 1000 * 8 * 128}.get(size, 50_000 * 256 * 2048)}
