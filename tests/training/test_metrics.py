"""The logs of a run: exact numbers, and cut back to where a run resumes."""

import json
import math
from pathlib import Path

import numpy as np

from latentjax.training.metrics import MetricsLog, read_metrics


def write_steps(workdir: Path, start: int, stop: int) -> None:
    log = MetricsLog(workdir, start)
    for step in range(start + 1, stop + 1):
        log.write({"step": step, "loss": float(np.float32(1) / np.float32(step)), "mfu": None})
        if step % 4 == 0:
            log.write_samples(step, [("def ", f"text of {step}")])
    log.close()


def test_floats_read_back_exactly(tmp_path: Path):
    write_steps(tmp_path, 0, 9)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [np.float32(line["loss"]) for line in lines] == [np.float32(1) / np.float32(step) for step in range(1, 10)]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["mfu"] is None


def test_resuming_drops_what_is_done_again(tmp_path: Path):
    write_steps(tmp_path, 0, 9)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')  # killed in the middle of a line
    write_steps(tmp_path, 5, 8)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 9))
    assert (tmp_path / "samples.txt").read_text().count("text of 4") == 1
    assert (tmp_path / "samples.txt").read_text().count("text of 8") == 1


def test_sampled_text_that_looks_like_a_header_does_not_end_the_file(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.write_samples(3, [("def ", "a\n=== step 99 ===\nb")])
    log.close()
    before = (tmp_path / "samples.txt").read_text()
    MetricsLog(tmp_path, 3).close()
    assert (tmp_path / "samples.txt").read_text() == before


def test_last_evaluation_survives_a_restart(tmp_path: Path):
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 1.0, "eval_loss": math.pi})
    log.write({"step": 2, "loss": 0.5})
    log.close()
    log = MetricsLog(tmp_path, 2)
    assert log.last["loss"] == 0.5
    assert log.last_evaluation["eval_loss"] == math.pi
    log.close()
