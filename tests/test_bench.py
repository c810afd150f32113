"""`python -m latentjax.bench` through its command line, on models that measure nothing but themselves."""

import importlib.util
import json
import subprocess

import pytest
from recipes import RECIPE

from latentjax import bench
from latentjax.errors import UserError
from latentjax.interop import torch_peer

needs_peer = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")),
    reason="the peer needs torch and transformers: pip install '.[peer]'",
)
PEER = ["peer", "--config", str(RECIPE), "--config.recurrence.train_jacobi_iterations=(1,)", "--rounds", "2"]


def test_step_measures_every_program_and_sets_times_against_work(capsys):
    arguments = ["step", "--config", str(RECIPE), "--thoughts", "1", "0", "--rounds", "3", "--steps", "1", "--json"]
    status = bench.main(arguments)
    report = json.loads(capsys.readouterr().out)
    programs, ratios = report["programs"], report["ratios"]
    named = [(each["num_latent_thoughts"], each["num_jacobi_iterations"]) for each in programs]
    assert named == [(0, 0), (1, 1), (1, 2)]
    assert [each["token_forwards"] for each in programs] == [1, 5, 7]
    for each in programs:
        assert len(each["seconds"]) == 3
        assert min(each["seconds"]) == each["best"] <= each["median"]
        assert each["tokens_per_second"] == pytest.approx(8 * 16 / each["median"])
        assert each["planned_bytes"] > 4 * 3 * 257 * 16  # parameters and moments of the embedding, at least
        assert each["compile_seconds"] > 0
    assert [ratio["token_forwards"] for ratio in ratios] == [5, pytest.approx(1.4)]
    assert [ratio["promised"] for ratio in ratios] == [False, True]
    assert status == (0 if all(ratio["holds"] for ratio in ratios) else 1)
    assert report["config"]["data"]["batch_size"] == 8


def test_checkpoint_sets_steps_with_saving_against_none(capsys, tmp_path):
    flags = ["--every", "3", "--rounds", "2", "--directory", str(tmp_path / "disk"), "--json"]
    status = bench.main(["checkpoint", "--config", str(RECIPE), *flags])
    report = json.loads(capsys.readouterr().out)
    assert report["state_bytes"] > 4 * 3 * 2 * 257 * 16  # parameters and moments of embedding and head, at least
    pairs = list(zip(report["plain_seconds"], report["saving_seconds"], strict=True))
    assert len(pairs) == 2
    assert report["ratio"] == pytest.approx(sum(plain / saving for plain, saving in pairs) / 2)
    assert all(0 < block < whole for block, whole in zip(report["blocked_seconds"], report["saving_seconds"]))
    assert all(seconds > 0 for seconds in report["written_seconds"])
    assert status == (0 if report["ratio"] >= 0.95 else 1)
    assert list((tmp_path / "disk").iterdir()) == []


@needs_peer
def test_peer_checks_and_measures_both(capsys):
    assert bench.main([*PEER, "--steps", "1", "--variant", "float32, eager", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    agreement = report["agreement"]
    assert agreement["peer_loss"] == pytest.approx(agreement["loss"], rel=1e-4)
    assert agreement["peer_gradient_norm"] == pytest.approx(agreement["gradient_norm"], rel=1e-3)
    assert report["peer_loss"] == pytest.approx(report["loss"], rel=1e-4)
    assert (len(report["seconds"]), len(report["peer_seconds"])) == (2, 2)
    assert report["best_ratio"] == pytest.approx(min(report["peer_seconds"]) / min(report["seconds"]))
    assert report["variant"] == "float32, eager"


@needs_peer
def test_a_peer_that_computes_something_else_is_not_timed(monkeypatch, capsys):
    """Here one that scales token embeddings otherwise."""
    honest = torch_peer.TorchPeer._hidden

    def dishonest(self, *arguments):
        self._embedding_scale = 1.0
        return honest(self, *arguments)

    monkeypatch.setattr(torch_peer.TorchPeer, "_hidden", dishonest)
    monkeypatch.setattr(torch_peer.TorchPeer, "step", lambda *arguments: pytest.fail("was timed"))
    with pytest.raises(UserError, match="the peer does not compute the same: .* nothing was timed"):
        bench.main(PEER)
    assert capsys.readouterr().out == ""


@needs_peer
def test_largest_batches_are_sought_in_processes_of_their_own(monkeypatch, capsys):
    """With all of the device's memory for the one that is tried: 5 sequences fit ours, and 2 the peer."""
    report = {"platform": "gpu", "variant": "autocast, eager", "text": ["the comparison"]}
    monkeypatch.setattr(bench, "_compare_in_a_process", lambda flags, overrides: report)

    def run(command, env, **arguments):
        rows = int(next(each for each in command if "batch_size" in each).partition("=")[2])
        fits = {"--fits=ours": 5, "--fits=peer": 2}
        side = next(each for each in command if each in fits)
        if side == "--fits=ours":
            assert env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"
        else:
            assert (env["JAX_PLATFORMS"], "--variant=autocast, eager" in command) == ("cpu", True)
        return subprocess.CompletedProcess(command, 0 if rows <= fits[side] else 3, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert bench.main([*PEER, "--largest_batch"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == ["the comparison", "largest batch, ours: 5", "largest batch, peer: 2"]
    assert "ours, a batch of 8: does not fit" in printed.err


@needs_peer
def test_a_comparison_outlives_a_failed_search(monkeypatch, capsys):
    report = {"platform": "cpu", "variant": "float32, eager", "text": ["the comparison"]}
    monkeypatch.setattr(bench, "_compare_in_a_process", lambda flags, overrides: report)
    assert bench.main([*PEER, "--largest_batch"]) == 1
    printed = capsys.readouterr()
    assert printed.out == "the comparison\n"
    assert "--largest_batch: on a CPU nothing says when memory runs out" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data", "--config.data.path=x"], "--config.data.path=x: bench data reads no config"),
        (["data", "--rounds", "0"], "--rounds must be at least 1, not 0"),
        (["step"], "the following arguments are required: --config"),
        (["step", "--config", str(RECIPE), "--thoughts", "-1"], "--thoughts: C must be at least 0, not -1"),
        (["step", "--config", str(RECIPE), "--config.model.widht=8"], "widht"),
        ([*PEER, "--config.model.architecture=llama", "--config.model.rotary_fraction=1.0"], "has no peer in PyTorch"),
        (["nothing"], "invalid choice: 'nothing'"),
        ([], "the following arguments are required: part"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value[:1]),
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(UserError) as error:
        bench.main(arguments)
    assert message in str(error.value)


def test_absent_packages_name_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"torch and transformers not installed.*'latentjax\[peer\]'"):
        bench.main(PEER)
