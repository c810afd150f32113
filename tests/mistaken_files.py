"""Makers of mistakes in paths and flags, as those of tests/mistakes.py in configs."""

import json
import random
from pathlib import Path

import mistakes
import recipes
from mistakes import Mistake, training

_SUFFIXES = ("jsonl", "jsonl.gz", "txt.zst", "parquet", "arrow", "bin", "idx", "txt")
RECIPE = ["--config", str(recipes.RECIPE)]


def _garbage(draw: random.Random, path: Path) -> Path:
    """A file of bytes that are no text and begin as no known format does."""
    path.write_bytes(b"\xff\xfe\x80" + draw.randbytes(200))
    return path


def bad_path(draw: random.Random, directory: Path) -> Mistake:
    absent = str(directory / "absent")
    (directory / "empty").mkdir()
    (directory / "file").write_text("x")
    (directory / "run").mkdir()
    suffix = draw.choice(_SUFFIXES)
    damaged = directory / "store"
    damaged.mkdir()
    content = draw.choice(["", "{", "[]", "null", '{"format": "other"}', '{"format": "latentjax token store"}', "\xff"])
    (damaged / "manifest.json").write_text(content, encoding="latin-1")
    saved = directory / "tokenizer"
    saved.mkdir()
    (saved / "tokenizer.json").write_text(draw.choice(["", "{}", "[1]", '{"model": {"vocab": 3}}', '{"model": []}']))
    kind = draw.choice(["json", "model"])
    bad_model = _garbage(draw, directory / f"bad.{kind}")
    inside = str(directory / "file" / "below")
    long_name = "a" * 256
    everything = "data.include=**/*"
    changes = {
        "absent": [f"data.path={absent}"],
        "remote": ["data.path=nosuchscheme://bucket/corpus"],
        "empty": [f"data.path={directory / 'empty'}", everything],
        "none_match": [f"data.path={damaged.parent}", f"data.include=*.{draw.choice(['rst', 'tex', 'md'])}"],
        "garbage": [f"data.path={_garbage(draw, directory / f'bad.{suffix}')}", "data.max_malformed=0"],
        "below a file": [f"data.path={inside}"],
        "long": [f"data.path={directory / long_name}"],
        "pattern": [f"data.path={directory}/*.nothing"],
        "tfds": [f"data.path=tfds:{draw.choice(['', 'x', 'no_such_data_set/train', '/', 'a/b/c/d'])}"],
        "store": [f"data.path={damaged}"],
        "eval set": [f'data.eval_sets=(("x", "{absent}"),)'],
        "mixture": ["data.path=", f'data.mixture=(("{recipes.CORPUS}", 1), ("{absent}", 1))'],
        "tokenizer": [f"data.tokenizer={absent}"],
        "tokenizer.json": [f"data.tokenizer={absent}.json"],
        "tokenizer.model": [f"data.tokenizer={absent}.model"],
        "tokenizer long": [f"data.tokenizer={long_name}.json"],
        "damaged tokenizer": [f"data.tokenizer={draw.choice([saved, bad_model])}"],
        "no tokenizer": [f"data.tokenizer={directory / 'empty'}"],
        "store cache": [f"data.store_cache={draw.choice([directory / 'file', inside])}", "data.eval_fraction=0.2"],
    }
    names = {
        "remote": ("nosuchscheme",), "none_match": ("no file",), "empty": ("empty",), "garbage": ("bad.",),
        "below a file": (inside,), "long": (long_name,), "pattern": ("*.nothing",), "tfds": ("tfds:",),
        "store": (str(damaged),), "tokenizer long": (long_name[:40],), "store cache": ("file",),
        "damaged tokenizer": (str(saved), str(bad_model)), "no tokenizer": (str(directory / "empty"),),
    }  # fmt: skip
    chosen = draw.choice([*changes, "recipe", "workdir", "run of another model", "run"])
    if chosen in changes:
        return training(directory, *changes[chosen], names=names.get(chosen, (absent,)))
    if chosen == "recipe":
        not_a_recipe = draw.choice(
            [absent, directory, f"{directory}/{long_name}", _garbage(draw, directory / "bad.py")]
        )
        return training(directory, recipe=not_a_recipe, names=("no recipe at", "bad.py"))
    if chosen == "workdir":
        place = draw.choice([directory / "file", directory / "file" / "run"])
        return Mistake("train", [*RECIPE, "--workdir", str(place)], (str(place),))
    written = directory / "run" / "config.json"
    if chosen == "run of another model":
        written.write_text(json.dumps({"model": {"num_layers": 99}}))
        return training(directory, names=("another model",))
    if draw.random() < 0.3:
        written.mkdir()
    else:
        written.write_bytes(draw.choice([b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b'{"model": 3}', b"[" * 10000]))
    return training(directory, names=(str(written),))


def bad_flag(draw: random.Random, directory: Path) -> Mistake:
    word = "".join(draw.choices("abcdefgh_", k=draw.randrange(1, 12)))
    workdir = ["--workdir", str(directory / "run")]
    arguments, name = draw.choice(
        [
            ([*RECIPE, f"--{word}"], f"--{word}"),
            ([*RECIPE, f"--{word}={word}"], f"--{word}"),
            ([*RECIPE, f"-{word[0]}"], f"-{word[0]}"),
            ([*RECIPE, word], word),
            ([*RECIPE, "--workdi", "x"], "--workdi"),
            ([*RECIPE, *workdir, "--workdir", "x"], "--workdir is given twice"),
            ([*RECIPE, *workdir, *RECIPE], "--config is given twice"),
            ([*workdir], "--config"),
            ([*RECIPE, "--workdir"], "--workdir"),
            ([*workdir, "--config"], "--config"),
            (["--config=", *workdir], "no recipe at ''"),
            ([*RECIPE, *workdir, "--num_processes", word], "--num_processes"),
            ([*RECIPE, *workdir, "--num_processes", "2"], "--num_processes"),
            ([*RECIPE, *workdir, "--process_id", "0", "--num_processes", "1"], "--coordinator"),
            *(
                ([*RECIPE, *workdir, "--coordinator", place, "--num_processes", "2", "--process_id", "0"], place)
                for place in (word, f"{word}:", f"{word}:{word}", ":1234", f"{word}:0", f"{word}:65536", "a:123456789")
            ),
            *(
                ([*RECIPE, *workdir, f"--coordinator={word}:12", f"--num_processes={n}", f"--process_id={i}"], "--proc")
                for n, i in ((0, 0), (-1, 0), (2, 2), (2, -1), (1, 7))
            ),
            ([*RECIPE, *workdir, f"--{word} " * 2000], f"--{word}"),
            ([*RECIPE, *workdir, "--config.=1"], "unknown config key ''"),
            ([*RECIPE, *workdir, "--config.model=1"], "unknown config key 'model'"),
            ([*RECIPE, *workdir, "--config."], "--config."),
        ]
    )
    return Mistake("train", arguments, (name,))


def other_verbs(draw: random.Random, directory: Path) -> Mistake:
    odd, absent = draw.randrange(3, 99, 2), str(directory / "absent")
    (directory / "file").write_text("x")
    knob = draw.choice(["model.num_layers=0", "optimizer.b1=2", "recurrence.method=x", "mesh.data=0", "data.sed=1"])
    compiled, topology = ["compile", *RECIPE], ["--topology", "v5e:2x2"]
    prepared = ["prepare", "--input", str(recipes.CORPUS / "tool.py"), "--output", f"{directory}/store"]
    as_bytes = [*prepared, "--tokenizer", "bytes"]
    small = ["bench", "data", "--directory", f"{directory}/file"]
    verb, *arguments, name = draw.choice(
        [
            [*compiled, "--topology"],
            *([*compiled, "--topology", name, "--topology"] for name in (
                "", "v5e", "v5e:", "v9:2x2", "v5e:2x2x2", "v5p:4x4", "v5e:3x4", "v5e:0x2", "v5e:99x99", "v5e:2x-2",
                "v5e:" + "9" * 5000 + "x2", "v5e:\uff14x\uff14", "x" * 3000, "v5e:2x2 ", "2x2")),
            *([*compiled, *topology, "--num_slices", count, "--num_slices"] for count in ("0", "-1", "99999", "two")),
            *([*compiled, *topology, "--num_jacobi_iterations", count, "--num_jacobi_iterations"] for count in (
                "-1", "1.5", "999999999")),
            *([*compiled, *topology, "--search", "--search_limit", count, "--search_limit"] for count in ("0", "-3")),
            [*compiled, *topology, f"--config.{knob}", knob.split("=")[0].split(".")[0]],
            [*compiled, *topology, *topology, "given twice"],
            ["compile", "--config", absent, *topology, absent],
            ["bench", "part"],
            ["bench", "steps", "steps"],
            ["bench", draw.choice(["step", "peer"]), "--config"],
            ["bench", draw.choice(["step", "peer"]), "--config", absent, absent],
            ["bench", draw.choice(["step", "peer"]), *RECIPE, f"--config.{knob}", knob.split("=")[0].split(".")[0]],
            *(["bench", "step", *RECIPE, "--rounds", n, "--rounds"] for n in ("0", "-1", "x", "1" + "0" * 30)),
            *(["bench", "step", *RECIPE, "--thoughts", n, name] for n, name in (
                ("-1", "--thoughts"), ("one", "--thoughts"), ("9999999", "num_latent_thoughts"))),
            ["bench", "step", *RECIPE, "--config.recurrence.method=vanilla", "--thoughts", "1", "--thoughts"],
            ["bench", "data", "--config.model.num_layers=2", "bench data reads no config"],
            *(["bench", "data", f"--{flag}", n, f"--{flag}"]
              for n in ("0", "-1", "x", "1" + "0" * 30)
              for flag in ("rounds", "batch_size", "sequence_length", "store_megabytes", "num_workers")),
            [*small, "--directory"],
            ["bench", "data", "--tokenizer", absent, absent],
            ["bench", "data", "--batch_size", "1000000", "--batch_size"],
            ["bench", "data", "--store_megabytes", "2000000000", "--store_megabytes"],
            ["prepare", "--input"],
            [*prepared, "--tokenizer"],
            [*prepared, "--tokenizer", absent, absent],
            *([*as_bytes, "--eval_fraction", n, "eval_fraction"] for n in ("0", "1", "-0.5", "nan", "x", "inf")),
            *([*as_bytes, flag, "-1", flag] for flag in ("--max_malformed", "--shard_megabytes", "--num_workers")),
            *([*prepared, "--tokenizer", "sentencepiece", "--vocab_size", n, "vocab"]
              for n in ("0", "-1", str(odd), "9" * 12, "x")),
            [*as_bytes, "--vocab_size", "300", "--vocab_size"],
            [*as_bytes, "--beam_options=--x", "--beam_options"],
            [*as_bytes, "--beam_runner=Cray", "--beam_runner"],
            [*as_bytes, "--beam_runner=DirectRunner", "--beam_options='", "--beam_options"],
            [*as_bytes, "--beam_runner=DirectRunner", "--beam_options=--direct_num_workers=x", "--beam_options"],
            [*as_bytes, "--json", "--json"],
            [*as_bytes, "--input", "x", "--input is given twice"],
            [*as_bytes, "--include", "--include"],
            ["prepare", "--input", absent, "--tokenizer", "bytes", "--output", absent, absent],
            ["prepare", "--input", str(recipes.CORPUS), "--include", "*.py", "--tokenizer", "bytes", "--output",
             f"{directory}/file", f"{directory}/file"],
            *(["prepare", flag, absent, absent] for flag in ("--verify", "--inspect")),
            *(["prepare", flag, str(directory), str(directory)] for flag in ("--verify", "--inspect")),
            ["prepare", "--verify", absent, "--inspect", absent, "--inspect"],
            ["prepare", "--verify", absent, "--output", absent, "--output"],
            [draw.choice(["compile", "prepare", "bench"]), f"--nonsense{odd}", ""],
        ]
    )  # fmt: skip
    return Mistake(verb, arguments, (name,))


MAKERS = {
    maker.__name__: maker
    for maker in (
        mistakes.misspelt_key, mistakes.missing_value, mistakes.wrong_type, mistakes.out_of_range,
        mistakes.wrong_choice, mistakes.contradiction, mistakes.bad_recipe, bad_path, bad_flag, other_verbs,
    )
}  # fmt: skip
