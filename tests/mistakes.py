"""Makers of mistakes: each draws a command line that cannot be right, and what its message must name.

A maker gets a seeded `random.Random` and an empty directory, and returns a `Mistake`. What is legal is written down
here anew and not taken from latentjax.validation: the two lists are checked against each other.
"""

import random
from dataclasses import dataclass
from pathlib import Path

import recipes

from latentjax.config import ALIASES, default, flatten

KNOBS = flatten(default())
INF, HUGE = "1e999", "1000000000000"

# Whole numbers: the lowest that is legal, and one that is too large for good.
_SIZES = [
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.intermediate_size",
    "model.vocab_size",
    "model.max_position_embeddings",
    "data.sequence_length",
    "data.batch_size",
    "data.tokenizer_vocab_size",
    "train.num_steps",
    "train.sample_tokens",
    "train.eval_tasks_batch_tokens",
    "train.gradient_accumulation_steps",
]
_PERIODS = ["train.log_every_steps", "train.eval_batches", "checkpoint.every_steps", "checkpoint.max_to_keep"]
_COUNTS = [
    "data.max_malformed",
    "data.shard_megabytes",
    "train.eval_every_steps",
    "train.sample_every_steps",
    "train.eval_tasks_num_fewshot",
    "train.eval_tasks_limit",
    "train.loss_chunk_tokens",
    "checkpoint.keep_every_steps",
    "recurrence.backprop_passes",
    "recurrence.ponder_chunk_tokens",
]
_LIMITED = {
    "recurrence.num_latent_thoughts": "100000",
    "recurrence.num_jacobi_iterations": "1e6",
    "model.num_kv_heads": HUGE,
    "data.num_threads": "1e6",
    "data.num_workers": "1e6",
    "data.prefetch_batches": "1e9",
    "data.device_prefetch": "1e9",
    "data.seed": "1e20",
    "train.seed": "1e11",
}
OUT_OF_RANGE = (
    dict.fromkeys(_SIZES, ("0", "-1", "-64", HUGE, "1e300"))
    | dict.fromkeys(_PERIODS, ("0", "-1", "1e19"))
    | dict.fromkeys(_COUNTS, ("-1", "-3", "1e19"))
    | {key: ("-1", "-2", largest) for key, largest in _LIMITED.items()}
    | {
        "recurrence.pause_token_id": ("-2", "257", HUGE),  # of 257 rows
        "recurrence.handover_ratio": ("-0.1", "1.1", INF),
        "recurrence.train_tolerance": ("-0.1", "1e39", INF),
        "model.rotary_fraction": ("-0.25", "1.5", INF),
        "model.rope_theta": ("0", "-1e4", "1e39", INF),
        "model.norm_epsilon": ("0", "-1e-5", "2", INF),
        "data.eval_fraction": ("0", "-0.1", "0.9", "1", INF),
        "optimizer.learning_rate": ("-1e-3", "1e39", INF),
        "optimizer.min_learning_rate_ratio": ("-0.1", "1.1", INF),
        "optimizer.warmup_ratio": ("-0.1", "10", INF),
        "optimizer.b1": ("-0.9", "1", "1.1", INF),
        "optimizer.b2": ("-0.9", "1", "0.999999999", INF),
        "optimizer.eps": ("0", "-1e-8", "2", INF),
        "optimizer.weight_decay": ("-0.1", "1e39", INF),
        "optimizer.clip_norm": ("-1", "1e39", INF),
        "train.sample_temperature": ("-0.5", "1e39", INF),
    }
    | {f"mesh.{axis}": ("0", "-2", HUGE) for axis in ("replica", "data", "fsdp", "sequence", "tensor")}
)
_WRONG_TYPES = {
    int: ["six", "6.5", "True", "[1]", "1,2", "{}", "nan", "None", INF, "", "1e-3", "0x", "--", "0or 1", "9" * 5000],
    float: ["fast", "nan", "inf", "-inf", "NaN", "True", "(1,)", "1j", "None", "", "1e", "x" * 3000, "1" + "0" * 400],
    bool: ["1", "0", "yes", "on", "None", "", "TRUE!", "[True]"],
}
_WRONG_TUPLES = {
    "recurrence.train_jacobi_iterations": ["", "()", "two", "(2, -1)", "2.5", "True", "(2, None)", "((2,),)", HUGE],
    "recurrence.train_schedule": [
        "0.5", "latent", "(0.0, 1, (2,))", "((0.0, 1),)", "((0.0, 1, 2),)", "((0.0, 1, ()),)", "((0.0, 2, (1,)),)",
        "((0.0, -1, (0,)),)", "((0.0, True, (1,)),)", "((0.0, 1, (2, -1)),)", "((0.0, 1, (2.5,)),)",
        "(('0', 1, (2,)),)", "((0.0, 0, (1,)),)", "((0.1, 1, (2,)),)", "((0.0, 1, (2,)), (1.0, 1, (3,)))",
        "((0.0, None, (0,)),)",
        "((0.0, 0, (0,)), (0.5, 1, (1,)), (0.5, 1, (2,)))", "((0.0, 0, (0,)), (1e999, 1, (1,)))", "((None, 1, (2,)),)",
    ],
    "data.mixture": [
        "stores/a", "('a', 0.5)", "(('a', '1'),)", "(('a', 0),)", "(('a', -1),)", "(('a', 1e999),)", "(('a', True),)",
        "(('', 1),)", "(('a', 1, 2),)", "(('a',),)", "3", "((1, 'a'),)", "(('a', None),)", f"(('a', {'9' * 400}),)",
    ],
    "data.eval_sets": [
        "stores/a", "('a', 'x')", "(('a', 1),)", "(('a b', 'x'),)", "(('', 'x'),)", "(('a', ''),)", "(('ä', 'x'),)",
        "(('a', 'x'), ('a', 'y'))", "(('x/y', 'x'),)", "7",
    ],
    "data.include": ["3", "(1, 2)", "('',)", "(None,)", "*.py,,*.md", "true"],
    "data.exclude": ["3", "('a', 2)", "('',)", "(('a',),)"],
    "train.eval_tasks": ["1", "('',)", "('piqa', None)", "(('piqa',),)", "piqa,,race"],
    "train.sample_prompts": ["1", "('',)", "('a', None)", "(('a',),)", "The,,A"],
}  # fmt: skip
_CHOICES = {
    "model.architecture": ["", "gpt", "GPT_NEOX", "llama2", " llama", "gpt-neox", "mamba"],
    "model.dtype": ["", "float16", "bf16", "fp32", "int8", "float64"],
    "model.attention": ["", "flash", "XLA", "sdpa", "splash", "cudnn", "tokamax"],  # the last three: not on a CPU
    "model.loops": ["", "scan", "Rolled", "true"],
    "model.remat": ["", "full", "all", "None", "keep_layer_input"],
    "recurrence.refinement": ["", "half", "Full", "jacobi"],
    "recurrence.method": ["", "laten", "Latent", "thoughts", "baseline"],
}


@dataclass(frozen=True)
class Mistake:
    """A command line that is wrong: the verb, its arguments, and texts of which the message must hold one."""

    verb: str
    arguments: list[str]
    names: tuple[str, ...]


def training(directory: Path, *overrides: str, names: tuple[str, ...], recipe: object = recipes.RECIPE) -> Mistake:
    """A mistake in a config."""
    flags = [f"--config.{override}" for override in overrides]
    return Mistake("train", ["--config", str(recipe), "--workdir", str(directory / "run"), *flags], names)


def misspelt_key(draw: random.Random, directory: Path) -> Mistake:
    known, key = {**KNOBS, **ALIASES}, draw.choice(list(KNOBS))
    while key in known:
        place = draw.randrange(len(key))
        key = draw.choice(
            [
                key[:place] + key[place + 1 :],
                key[:place] + key[place] + key[place:],
                key[:place] + draw.choice("abcxyz_.") + key[place + 1 :],
                key[:place] + key[place + 1 : place + 2] + key[place] + key[place + 2 :],
                key.rsplit(".", 1)[-1],
                key.split(".")[0],
                key.upper(),
                key * 40,
            ]
        )
    key = key.replace("=", "")
    return training(directory, f"{key}={draw.choice(['1', 'x', ''])}", names=("unknown config key",))


def missing_value(draw: random.Random, directory: Path) -> Mistake:
    key = draw.choice([key for key, value in KNOBS.items() if not isinstance(value, str | tuple)])
    mistake = training(directory, *draw.sample(["model.num_layers=2", "data.seed=1"], draw.randrange(3)), names=(key,))
    flag = f"--config.{key}"
    place = draw.choice([[flag], [f"{flag}="], [flag, "--config.train.seed=1"], [flag, ""]])
    return Mistake(mistake.verb, mistake.arguments + place, mistake.names)


def wrong_type(draw: random.Random, directory: Path) -> Mistake:
    key = draw.choice([key for key, value in KNOBS.items() if not isinstance(value, str)])
    values = _WRONG_TUPLES.get(key) or _WRONG_TYPES[type(KNOBS[key])]
    changes = ["data.path="] if key == "data.mixture" else []
    return training(directory, *changes, f"{key}={draw.choice(values)}", names=(key,))


def out_of_range(draw: random.Random, directory: Path) -> Mistake:
    key = draw.choice(list(OUT_OF_RANGE))
    names = (key, "config group 'mesh'") if key.startswith("mesh.") else (key,)
    return training(directory, f"{key}={draw.choice(OUT_OF_RANGE[key])}", names=names)


def wrong_choice(draw: random.Random, directory: Path) -> Mistake:
    key = draw.choice(list(_CHOICES))
    return training(directory, f"{key}={draw.choice(_CHOICES[key])}", names=(key,))


def contradiction(draw: random.Random, directory: Path) -> Mistake:
    heads, odd = draw.randrange(3, 9), draw.randrange(3, 99, 2)
    llama = ("model.architecture=llama", "model.rotary_fraction=1.0")
    changes, names = draw.choice(
        [
            ([f"model.num_heads={heads}", f"model.hidden_size={heads * 8 + draw.randrange(1, heads)}"],
             ["model.hidden_size"]),
            ([f"model.num_heads={heads}", f"model.hidden_size={heads // 2}"], ["model.hidden_size"]),
            ([*llama, f"model.num_heads={heads}", f"model.hidden_size={8 * heads}",
              f"model.num_kv_heads={heads + draw.randrange(1, 9)}"], ["model.num_kv_heads"]),
            (["model.num_heads=2", "model.num_kv_heads=1"], ["model.num_kv_heads"]),
            ([*llama, "model.num_heads=2", f"model.hidden_size={2 * odd}"], ["model.rotary_fraction"]),
            (["model.architecture=llama", f"model.rotary_fraction={draw.choice([0.25, 0.5, 0.99])}"],
             ["model.rotary_fraction"]),
            ([f"data.batch_size={8 * heads + draw.randrange(1, 8)}"], ["data.batch_size"]),
            ([f"data.batch_size={odd}", "train.gradient_accumulation_steps=2"], ["train.gradient_accumulation_steps"]),
            (["data.batch_size=8", f"train.gradient_accumulation_steps={draw.choice([2, 4, 8, 16])}"],
             ["data.batch_size"]),
            ([f"mesh.data={draw.choice([1, 2, 3, 5, 7, 9, 16])}"], ["config group 'mesh'"]),
            ([f"mesh.{draw.choice(['fsdp', 'replica', 'tensor'])}=-1"], ["config group 'mesh'"]),
            ([f"mesh.{draw.choice(['fsdp', 'replica'])}={odd}"], ["config group 'mesh'"]),
            (["mesh.data=-1", "mesh.tensor=2"], ["model.vocab_size", "mesh.tensor"]),  # of 257 rows
            (["mesh.data=1", "mesh.tensor=8"], ["model.num_heads", "mesh.tensor"]),
            (["mesh.sequence=8", "mesh.data=1", f"data.sequence_length={odd}", "model.max_position_embeddings=128"],
             ["data.sequence_length"]),
            (["mesh.fsdp=8", "mesh.data=1", "model.hidden_size=20", "model.num_heads=1", "model.rotary_fraction=1.0"],
             ["model.hidden_size"]),
            ([f"data.sequence_length={65 + odd}"], ["data.sequence_length"]),
            ([f"model.max_position_embeddings={draw.randrange(1, 16)}"], ["model.max_position_embeddings"]),
            ([f"train.sample_tokens={61 + odd}"], ["train.sample_tokens"]),
            ([f"train.sample_prompts={'word ' * 15}"], ["train.sample_tokens"]),
            ([f"model.vocab_size={257 - odd}"], ["model.vocab_size"]),
            (['data.mixture=(("a", 1),)'], ["data.mixture"]),
            (["data.path=", "data.mixture=()"], ["data.path"]),
            ([f"model.hidden_size={2 * 10**7}", "model.num_layers=900"], ["model.hidden_size"]),
            (["data.batch_size=1e6", "data.sequence_length=4096", "model.max_position_embeddings=4096"],
             ["data.batch_size"]),
            (["data.sequence_length=10000000", "model.max_position_embeddings=10000000"], ["data.sequence_length"]),
            (["data.tokenizer="], ["data.tokenizer"]),
            (["data.store_cache="], ["data.store_cache"]),
            (["data.tokenizer=sentencepiece", f"data.tokenizer_vocab_size={odd}"], ["vocabulary of"]),
            (["data.tokenizer=sentencepiece", f"data.tokenizer_vocab_size={10**6 + odd}"], ["vocabulary of"]),
            (["data.path=a\0b"], ["data.path"]),
            ([f"recurrence.method={draw.choice(['loop', 'ponder'])}", f"recurrence.backprop_passes={odd}"],
             ["recurrence.backprop_passes"]),
            ([f"recurrence.method={draw.choice(['loop', 'ponder', 'vanilla', 'pause'])}",
              "recurrence.train_schedule=((0.0, 1, (2,)),)"], ["recurrence.train_schedule"]),
            ([f"recurrence.method={draw.choice(['loop', 'ponder', 'vanilla', 'pause'])}",
              "recurrence.refinement=alternating"], ["recurrence.refinement"]),
            (["recurrence.refinement=alternating", "recurrence.backprop_passes=1"], ["recurrence.backprop_passes"]),
            (["recurrence.train_tolerance=0.1"], ["recurrence.backprop_passes"]),
            (["recurrence.train_tolerance=0.1", "recurrence.backprop_passes=2"],
             ["recurrence.train_jacobi_iterations"]),
            (["recurrence.train_tolerance=0.1", "recurrence.backprop_passes=4",
              f"recurrence.train_jacobi_iterations={draw.randrange(3)}"], ["recurrence.train_jacobi_iterations"]),
            (["recurrence.train_tolerance=0.1", "recurrence.backprop_passes=1",
              "recurrence.train_schedule=((0.0, 1, (1, 2)),)"], ["recurrence.train_schedule"]),
            ([f"recurrence.method={draw.choice(['loop', 'ponder', 'vanilla', 'pause'])}",
              "recurrence.train_tolerance=0.1"], ["recurrence.train_tolerance"]),
            (["recurrence.handover_ratio=0.1"], ["recurrence.train_schedule"]),
            (["recurrence.train_schedule=((0.0, 0, (0,)), (0.9, 1, (2,)))", "recurrence.handover_ratio=0.2"],
             ["recurrence.handover_ratio"]),
            (["recurrence.train_schedule=((0.0, 1, (2,)),)", "recurrence.num_latent_thoughts=0"],
             ["recurrence.train_schedule"]),
            (["recurrence.method=pause"], ["recurrence.pause_token_id"]),  # the last row is the tokenizer's
            (["train.sample_prompts=\udcff"], ["train.sample_prompts"]),
            ([f"train.tasks_every_steps={odd}"], ["train.eval_tasks"]),
        ]
    )  # fmt: skip
    return training(directory, *changes, names=tuple(names))


def bad_recipe(draw: random.Random, directory: Path) -> Mistake:
    lines = "\n" * draw.randrange(9)
    head = "from latentjax.config import default\ndef get_config():\n    config = default()\n"
    source, name = draw.choice(
        [
            (lines + "x = 1\ndef get_config(:\n    pass\n", f"recipe.py:{len(lines) + 2}: "),
            (lines + "'unterminated\n", f"recipe.py:{len(lines) + 1}: "),
            (lines + "y = 1 / 0\n", f"recipe.py:{len(lines) + 1}: ZeroDivisionError"),
            (lines + "import no_such_module_at_all\n", "no_such_module_at_all"),
            (lines + "raise ValueError('several\\nlines\\n' + 'and long ' * 1000)\n", "ValueError: several lines"),
            (lines + "raise SystemExit(3)\n", "the recipe left Python"),
            (lines + "open('/no/such/file')\n", "No such file or directory: '/no/such/file'"),
            ("def get_config():\n    exit()\n", "the recipe left Python"),
            ("x = 1\n", "defines no get_config"),
            ("get_config = 3\n", "defines no get_config"),
            ("def get_config():\n    pass\n", "must return a config"),
            ("def get_config():\n    return {'model': 1}\n", "must return a config"),
            ("from ml_collections import ConfigDict\ndef get_config():\n    return ConfigDict()\n", "must return"),
            ("def get_config():\n    return get_config()\n", "RecursionError"),
            ("def get_config(one, two):\n    pass\n", "missing 2 required positional arguments"),
            (head + "    config.model.num_layer = 3\n    return config\n", "recipe.py:4: AttributeError"),
            (head + "    config.model.num_layers = 'x'\n    return config\n", "recipe.py:4: TypeError"),
            (head + "    config.model.num_layers = None\n    return config\n", "model.num_layers"),
            (head + "    config.model.num_layers = True\n    return config\n", "model.num_layers"),
            (head + "    config.model.num_layers = 10 ** 5000\n    return config\n", "model.num_layers"),
            (head + "    config.data.path = None\n    return config\n", "data.path"),
            (head + "    config.optimizer.learning_rate = float('nan')\n    return config\n", "learning_rate"),
            (head + "    config.train.sample_prompts = ('a', 3)\n    return config\n", "train.sample_prompts"),
            (head + "    config.data.mixture = [['a', 1]]\n    return config\n", "data.mixture"),
            (head + "    config.model = None\n    return config\n", "config"),
            (head + "    del config.mesh\n    return config\n", "config"),
            ("\0\0", "recipe.py"),
            ("# coding: no-such-codec\n", "recipe.py"),
        ]
    )
    path = directory / "recipe.py"
    path.write_text(source)
    given = path
    if "def get_config()" in source and "pass" in source and draw.random() < 0.5:
        given, name = f"{path}:argument", "takes no argument"
    return training(directory, names=(name,), recipe=given)
