"""Golden loss curves: what a hundred steps of each method and architecture came to, and how to make them again.

    python tests/golden_curves.py                        # how far a run of this tree is from what is stored
    python tests/golden_curves.py model.loops=rolled     # the same with other knobs
    python tests/golden_curves.py --write                # stores what this tree gives, on purpose

Runs go through the whole loop, data and all, on text that is made here, so that nothing but latentjax and the packages
below it has a part in the numbers. They are stored in tests/fixtures/golden_curves/, from one CPU device in float32.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from latentjax.config import default, set_key

DIRECTORY = Path(__file__).parent / "fixtures" / "golden_curves"
NUM_STEPS = 100
KEYS = ("loss", "grad_norm")

# Method, architecture, C, and the values that R is drawn from.
CURVES = {
    "vanilla-gpt_neox": ("vanilla", "gpt_neox", 0, (0,)),
    "vanilla-llama": ("vanilla", "llama", 0, (0,)),
    "vanilla-gpt2": ("vanilla", "gpt2", 0, (0,)),
    "latent-c1-gpt_neox": ("latent", "gpt_neox", 1, (1, 2)),
    "latent-c1-llama": ("latent", "llama", 1, (1, 2)),
    "latent-c1-gpt2": ("latent", "gpt2", 1, (1, 2)),
    "latent-c2-gpt_neox": ("latent", "gpt_neox", 2, (2,)),
    "latent-c2-llama": ("latent", "llama", 2, (2,)),
}

_WORDS = "a thought is fed back before each token and the model reads what it has written so far".split()  # noqa: SIM905


def corpus() -> str:
    """JSON lines of made-up documents: words with a preference for what follows them, drawn without any library."""
    state, lines = 1, []
    for number in range(300):
        words, word = [], number
        for _ in range(30):
            state = (6364136223846793005 * state + 1442695040888963407) % 2**64
            word = (5 * word + (state >> 33) % 4) % len(_WORDS)
            words.append(_WORDS[word])
        lines.append(json.dumps({"text": f"{number}: {' '.join(words)}.\n"}))
    return "\n".join(lines) + "\n"


def config_of(name: str, directory: Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The config of a curve; its corpus is written into `directory`.

    Every knob of the optimizer counts for something: the decay is strong, and the gradients' norm is clipped at first.
    """
    method, architecture, num_thoughts, iterations = CURVES[name]
    path = directory / "corpus.jsonl"
    path.write_text(corpus())
    config = default()
    config.model.update(
        architecture=architecture, num_layers=2, hidden_size=32, num_heads=4, intermediate_size=48, vocab_size=264,
        max_position_embeddings=64, dtype="float32", attention="xla",
    )  # fmt: skip
    if architecture == "llama":
        config.model.update(num_kv_heads=2, rotary_fraction=1.0)
    elif architecture == "gpt2":
        config.model.update(rotary_fraction=0.0, tie_embeddings=True)
    config.recurrence.update(
        method=method, num_latent_thoughts=num_thoughts, train_jacobi_iterations=iterations
    )  # fmt: skip
    config.data.update(path=str(path), store_cache=str(directory / "stores"), tokenizer="bytes", eval_fraction=0.1)
    config.data.update(sequence_length=32, batch_size=8, mask_documents=True)
    config.optimizer.update(learning_rate=3e-3, warmup_ratio=0.1, weight_decay=1.0, clip_norm=1.0)
    config.train.update(num_steps=NUM_STEPS, log_every_steps=1, eval_every_steps=0, sample_every_steps=0)
    config.train.compilation_cache = ""  # what is measured is what this tree compiles
    config.checkpoint.every_steps = 10 * NUM_STEPS
    for override in overrides:
        key, _, value = override.partition("=")
        set_key(config, key, value)
    return config


def curve(name: str, overrides: Sequence[str] = ()) -> dict[str, list[float]]:
    """Trains; returns the values of each of KEYS at every step."""
    from latentjax.training.loop import train
    from latentjax.training.metrics import read_metrics
    from latentjax.training.signals import StopRequest
    from latentjax.validation import validate

    with tempfile.TemporaryDirectory(prefix="latentjax-golden-") as place:
        config = config_of(name, Path(place), overrides)
        validate(config)
        train(config, Path(place) / "run", StopRequest())
        lines = read_metrics(Path(place) / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, config.train.num_steps + 1))
    return {key: [line[key] for line in lines] for key in KEYS}


def stored(name: str) -> dict[str, list[float]]:
    """The golden curve of that name."""
    return json.loads((DIRECTORY / f"{name}.json").read_text())


def difference(found: dict[str, list[float]], golden: dict[str, list[float]], key: str) -> float:
    """The greatest relative difference of two curves at any step that both have."""
    return max(abs(one - other) / abs(other) for one, other in zip(found[key], golden[key], strict=False))


def main(argv: Sequence[str]) -> None:
    """See the module."""
    writes = "--write" in argv
    overrides = [argument for argument in argv if argument != "--write"]
    for name in CURVES:
        found = curve(name, overrides)
        if writes:
            DIRECTORY.mkdir(parents=True, exist_ok=True)
            # Eight digits: all that float32 has.
            rounded = {key: [float(f"{value:.8g}") for value in values] for key, values in found.items()}
            (DIRECTORY / f"{name}.json").write_text(json.dumps(rounded).replace("], ", "],\n ") + "\n")
        parts = [f"{key} {difference(found, stored(name), key):.1e}" for key in KEYS]
        print(f"{name}: loss {found['loss'][0]:.4f} to {found['loss'][-1]:.4f}; differs by {', '.join(parts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
