"""What a run says of itself: no more than it knows, and as of the step that is asked for."""

import json

from recipes import get_config

from latentjax.training.run_facts import read_run_facts


def test_facts_are_those_of_the_step(tmp_path):
    config = get_config()
    lines = [
        {"step": 4, "loss": 3.5, "eval_loss": 3.25, "tokens": 512},
        {"step": 8, "loss": 2.5, "tokens": 1024},
        {"step": 9, "loss": 1.5, "eval_loss": None, "eval_bits_per_byte/x": 1.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = read_run_facts(tmp_path, config, 8)
    assert (facts.step, facts.tokens, facts.data) == (8, 8 * 8 * 16, "json")
    assert facts.losses == {"loss": 2.5, "eval_loss": 3.25}
    assert facts.settings["optimizer.learning_rate"] == 1e-2 and facts.versions == {}
    assert read_run_facts(tmp_path, config, 9).losses == {"loss": 1.5, "eval_loss": 3.25, "eval_bits_per_byte/x": 1.25}
    config.data.mixture = (("/secret/place/one", 1.0), ("two.jsonl", 0.5))
    (tmp_path / "summary.json").write_text('{"versions": {"jax": "1"}}')
    facts = read_run_facts(tmp_path, config, 8)
    assert facts.data == "one (weight 1), two.jsonl (weight 0.5)" and facts.versions == {"jax": "1"}


def test_without_logs(tmp_path):
    (tmp_path / "summary.json").write_text("[")
    facts = read_run_facts(tmp_path, get_config(), 3)
    assert facts.losses == {} and facts.versions == {} and facts.step == 3
