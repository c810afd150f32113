"""The verb report: runs compared, what configs cost, on one page or as JSON; every mistake in one line."""

import builtins
import json
import shutil

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
        (["--cost", LATENT, "--output", "there"], "without --output"),
        (["runs/mine", "--cost", LATENT], "goes without runs"),
        (["configs", "--json"], "'configs' is not a run"),
        (["no/such/run", "--json"], "'no/such/run' is not a run"),
        (["runs/mine"], "give --output DIR, or --json"),
        (["runs/mine", "runs/other/../mine", "--json"], "given twice"),
        (["runs/mine", "--json", "--within", "nan"], "--within must be a percentage"),
        (["runs/mine", "--json", "--budgets", "1e12", "-1"], "--budgets must be numbers of FLOPs above 0"),
        (["runs/mine", "--json", "--config.train.seed=1"], "is for --cost"),
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


def test_a_run_as_it_was_trained(whole_run, tmp_path, capsys):
    """The page and the numbers of one that training has made; and warnings of another that was killed."""
    killed = tmp_path / "killed"
    killed.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(whole_run / name, killed)
    lines = (killed / "metrics.jsonl").read_bytes()
    (killed / "metrics.jsonl").write_bytes(lines[: lines.rindex(b"eval_loss")])
    assert main([str(whole_run), str(killed), "--output", str(tmp_path / "out"), "--json"]) == 0
    out, said = capsys.readouterr()
    found = json.loads(out)
    (setting,) = found["settings"]
    summary = json.loads((whole_run / "summary.json").read_text())
    assert setting["label"] == "latent, C = 1" and setting["counted"] == [str(whole_run)] and setting["finished"]
    for name, expected in (
        ("held_out_loss", summary["eval_loss"]), ("bits_per_byte", summary["eval_bits_per_byte"]),
        ("parameters", summary["parameters"]), ("tokens", summary["tokens"]), ("wall_seconds", summary["wall_seconds"]),
    ):  # fmt: skip
        assert setting[name] == {"mean": expected, "standard_deviation": None, "n": 1}
    # From the rates in the log, and from the clock.
    assert 0 < setting["step_seconds"]["mean"] <= summary["wall_seconds"]
    assert found["runs"][1]["remarks"][0].startswith("the last line of metrics.jsonl is cut off")
    assert f"warning: {killed}: not finished: at step 11 of 12." in said and "wrote" in said
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert str(whole_run) in page and summary["versions"]["jax"] in page


def test_where_nothing_can_be_written_or_drawn(whole_run, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else than a report"):
        main([str(whole_run), "--output", str(tmp_path)])
    with pytest.raises(UserError, match="cannot write to --output"):
        main([str(whole_run), "--output", str(tmp_path / "notes.txt" / "below")])
    real = builtins.__import__

    def without_matplotlib(name, *arguments):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(UserError, match=r"latentjax\[report\]"):
        main([str(whole_run), "--output", str(tmp_path / "out")])
    assert main([str(whole_run), "--json"]) == 0


def test_nothing_to_compare(whole_run, tmp_path):
    shutil.copy(whole_run / "config.json", tmp_path)
    with pytest.raises(UserError, match="no run has logged a step yet"):
        main([str(tmp_path), "--json"])
