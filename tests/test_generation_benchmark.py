"""`python -m latentjax.bench generate` in its shortest form, on a model that measures nothing but itself."""

import importlib.util
import json

import pytest
from recipes import RECIPE

from latentjax import bench, generation_benchmark
from latentjax.errors import UserError
from latentjax.generation_benchmark import GenerationTimes

ARGUMENTS = ["generate", "--config", str(RECIPE), "--batches", "2", "--prompt_tokens=5", "--new_tokens=6", "--rounds=2"]
needs_peer = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="the peer needs torch and transformers: pip install '.[peer]'",
)


@needs_peer
def test_both_are_compared_and_timed(capsys):
    status = bench.main([*ARGUMENTS, "--json"])
    report = json.loads(capsys.readouterr().out)
    (times,) = report["results"]
    assert (times["batch_size"], times["prompt_tokens"], times["new_tokens"]) == (2, 5, 6)
    assert times["alike"] == 1.0
    ours, theirs = times["seconds"], times["peer_seconds"]
    assert len(ours) == len(theirs) == 2 and min(*ours, *theirs) > 0
    assert times["ratio"] == pytest.approx(sum(peer / mine for mine, peer in zip(ours, theirs, strict=True)) / 2)
    assert times["holds"] == (times["ratio"] >= 2.0) and status == (0 if times["holds"] else 1)
    assert report["config"]["model"]["num_layers"] == 2


@needs_peer
def test_a_peer_that_writes_something_else_is_not_timed(monkeypatch):
    """Here one that repeats an id that there is none of."""
    monkeypatch.setattr(
        generation_benchmark._Peer,
        "generate",
        lambda self, prompts, count: prompts[:, :1].repeat(count, axis=1) * 0 - 1,
    )
    with pytest.raises(UserError, match=r"do not write the same: 0\.0% of 12 tokens are alike; nothing was timed"):
        bench.main(ARGUMENTS)


def test_the_table_gives_tokens_per_second():
    """200 tokens in 1 s at best and in 2 s in the middle; those of the peer in 3 s and 4 s."""
    times = GenerationTimes(4, 10, 50, 0.995, 1.5, (2.0, 1.0, 4.0), (5.0, 3.0, 4.0))
    assert times.ratio == 2.5 and times.holds
    first, _, ours, theirs, ratio = times.lines()
    assert "batch 4: 50 tokens behind 10; 99.5%" in first
    assert [line.split()[1:3] for line in (ours, theirs, ratio)] == [
        ["200.0", "100.0"],
        ["66.7", "50.0"],
        ["3.00", "2.50"],
    ]
