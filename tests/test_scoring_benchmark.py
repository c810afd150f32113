"""`python -m latentjax.bench scoring` in its shortest form, on a model that measures nothing but itself."""

import importlib.util
import json
from pathlib import Path

import pytest
from recipes import RECIPE

from latentjax import bench, scoring_benchmark
from latentjax.errors import UserError
from latentjax.scoring_benchmark import ScoringTimes, make_requests

ARGUMENTS = ["scoring", "--config", str(RECIPE), "--questions=1", "--batch_tokens=1024", "--rounds=1"]
needs_peer = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "lm_eval")),
    reason="the peer needs lm_eval, torch and transformers: pip install '.[tasks,peer]'",
)


@needs_peer
def test_both_are_compared_and_timed(capsys):
    status = bench.main([*ARGUMENTS, "--json"])
    (times,) = json.loads(capsys.readouterr().out)["results"]
    requests = make_requests(1, 257, 64)
    assert times["num_requests"] == len(requests) == 27
    assert times["num_tokens"] == sum(len(context) + len(continuation) for _, context, continuation in requests)
    assert 0 <= times["difference"] < 1e-4 and times["peer_batch"] in (1, 8)
    assert len(times["seconds"]) == len(times["peer_seconds"]) == 1
    assert times["ratio"] == pytest.approx(times["peer_seconds"][0] / times["seconds"][0])
    assert times["holds"] == (times["ratio"] >= 1.5) and status == (0 if times["holds"] else 1)
    assert 0 < times["compile_seconds"] < times["first_seconds"]


class Indifferent:
    """A peer to which every continuation is as likely."""

    def __init__(self, folder: Path, dtype: str, platform: str):
        assert (folder / "model.safetensors").is_file() and (dtype, platform) == ("float32", "cpu")

    def score(self, requests: list, size: int) -> list[tuple[float, bool]]:
        return [(-1.0, False)] * len(requests)


def test_a_peer_that_scores_otherwise_is_not_timed(monkeypatch):
    monkeypatch.setattr(scoring_benchmark, "_Peers", Indifferent)
    with pytest.raises(UserError, match="does not compute the same: .* nothing was timed"):
        bench.main(ARGUMENTS)


def test_requests_are_shaped_as_tasks_and_fit():
    requests = make_requests(2, 50_000, 512)
    assert len(requests) == 2 * 27 and requests == make_requests(2, 50_000, 512)
    assert all(0 < len(context) <= 256 and 0 < len(continuation) <= 256 for _, context, continuation in requests)
    assert max(len(context) for _, context, _ in requests) == 256
    assert all(0 <= each < 50_000 for _, *parts in requests for ids in parts for each in ids)
    assert len({tuple(context) for _, context, _ in requests}) == 2 * 8  # choices share theirs


def test_the_table_gives_requests_per_second():
    times = ScoringTimes(30, 900, 1.5, 4.0, 2e-6, 8, (2.0, 3.0), (2.0, 3.0))
    assert times.ratio == 1.0 and not times.holds
    first, _, ours, theirs, ratio = times.lines()
    assert "30 requests of 900 tokens" in first and "2.0e-06" in first and "batches of 8" in theirs
    assert ours.split() == ["ours", "15.00", "12.00", "2.00", "2.50"]
    assert ratio.split()[:3] == ["ratio", "1.00", "1.00"]
