"""What tests of the evaluation harness work with: a tokenizer, and tasks of every kind with local data."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from latentjax.data.sample_text import PROSE, SOURCE

VOCAB_SIZE = 300
END = "<|endoftext|>"

_CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{train}", test: "{test}"}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_LIKELIHOOD = """
task: local_last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{test}"}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{test}"}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
_GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{train: "{train}", test: "{test}"}}}}
output_type: generate_until
training_split: train
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs: {{until: ["\\n", " e"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
TASKS = {
    "local_choice": _CHOICE,
    "local_last_word": _LIKELIHOOD,
    "local_rolling": _ROLLING,
    "local_generate": _GENERATE,
}


def write_tasks(directory: Path, num_questions: int = 6) -> Path:
    """Writes tasks of every kind with their data; the texts are pieces of real ones."""
    directory.mkdir(parents=True, exist_ok=True)
    words, draw = PROSE.split(), random.Random(0)

    def phrase(low: int, high: int) -> str:
        start = draw.randrange(len(words) - high)
        return " ".join(words[start : start + draw.randint(low, high)])

    def example() -> dict:
        choices = [phrase(1, 4) for _ in range(3)]
        choices.append(choices[0] + " indeed")  # one continuation goes on where another ends
        return {
            "question": phrase(3, 12),
            "choices": choices,
            "label": draw.randrange(4),
            "text": phrase(5, 12),
            "long": phrase(30, 60),
        }

    files = {}
    for split, count in (("train", 8), ("test", num_questions)):
        files[split] = directory / f"{split}.jsonl"
        files[split].write_text("".join(json.dumps(example()) + "\n" for _ in range(count)))
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(text.format(**files))
    return directory


def write_tokenizer(directory: Path, *, begins: bool = False) -> None:
    """Writes a byte-level tokenizer as transformers loads it; with `begins` it puts a token before every text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [END, "<s>"] if begins else [END]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE, SOURCE], trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "clean_up_tokenization_spaces": False}
    if begins:
        config["bos_token"] = "<s>"
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
