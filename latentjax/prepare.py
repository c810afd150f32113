"""`python -m latentjax.prepare`: tokenises a raw corpus into a token store, once, for many runs to read.

python -m latentjax.prepare --input corpus/ --include '**/*.py' --tokenizer sentencepiece --output stores/mine
python -m latentjax.prepare --verify stores/mine
python -m latentjax.prepare --inspect stores/mine

Given again after an interruption, the same command goes on where it was.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from latentjax.command_line import LineParser
from latentjax.config import default
from latentjax.data.beam import RUNNERS, beam_tasks
from latentjax.data.inspection import describe, inspect
from latentjax.data.output import OutputDirectory
from latentjax.data.preparation import claim
from latentjax.data.progress import Progress
from latentjax.data.resolve import TRAINED, build_store, local_tasks, open_corpus, recipe_of
from latentjax.data.store import MANIFEST_FILE, TokenStore
from latentjax.errors import UserError, run_verb

# Flags that are keys of the config's `data` group, with what they are for.
_DATA_FLAGS = {
    "text_field": "field of a JSON line, Parquet row or data set example that holds the text, or a list of token ids",
    "eod_token": "end-of-document token of a tokenizer.json; unset: found in the files beside it",
    "eval_fraction": "share of documents held out for evaluation",
    "max_malformed": "so many malformed documents are left out and counted; more are an error",
    "shard_megabytes": "input per shard in MB; 0: by the size of the corpus",
}


def _parser() -> LineParser:
    data = default().data
    parser = LineParser(
        prog="python -m latentjax.prepare",
        description="Tokenise a raw corpus into a token store. Given again after an interruption, it goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--input",
        help="a file (text, .jsonl, .parquet; .gz and .zst too), a directory or quoted glob of such files, a directory "
        "written by Hugging Face datasets, or tfds:NAME/SPLIT; local or a URL (gs://, s3://, hf://)",
    )
    parser.add_argument(
        "--tokenizer",
        help="bytes, sentencepiece (trained here), a sentencepiece .model file, a Hugging Face tokenizer.json or a "
        "directory that holds one of these",
    )
    parser.add_argument("--output", help="the token store: a directory (or URL) to be made")
    parser.add_argument(
        "--vocab_size", type=int, help=f"of the sentencepiece model trained here ({data.tokenizer_vocab_size} if unset)"
    )
    parser.add_argument(
        "--include", nargs="+", default=data.include, metavar="GLOB", help="files of a directory to read"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=data.exclude, metavar="GLOB", help="files and directories to leave out again"
    )
    for name, purpose in _DATA_FLAGS.items():
        parser.add_argument(f"--{name}", type=type(data[name]), default=data[name], help=purpose)
    parser.add_argument(
        "--packed_rows",
        action="store_true",
        help="rows of token ids are stretches of one stream, not documents: no end of document is put behind each",
    )
    parser.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="processes that tokenise; the result is the same"
    )
    parser.add_argument("--beam_runner", choices=RUNNERS, help="prepare as an Apache Beam pipeline, on this runner")
    parser.add_argument(
        "--beam_options",
        default="",
        metavar="OPTIONS",
        help="of the runner, in one argument: --beam_options='--project=mine --region=europe-west4'",
    )
    parser.add_argument("--verify", type=Path, metavar="STORE", help="check every hash of a finished store instead")
    parser.add_argument("--inspect", type=Path, metavar="STORE", help="show what a finished store holds instead")
    parser.add_argument("--json", action="store_true", help="with --inspect: print it as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the corpus or the output.
    """
    flags = _parser().parse_args(argv)
    _check_together(flags)
    if flags.verify is not None:
        return _verify(flags.verify)
    if flags.inspect is not None:
        facts = inspect(TokenStore(flags.inspect))
        print(json.dumps(facts, indent=2, ensure_ascii=False) if flags.json else describe(facts))
        return 0
    for name in ("input", "tokenizer", "output"):
        if getattr(flags, name) is None:
            raise UserError(f"--{name} is missing (--help lists the flags)")
    if flags.num_workers < 1:
        raise UserError(f"--num_workers must be at least 1, not {flags.num_workers}")
    if flags.beam_options and not flags.beam_runner:
        raise UserError("--beam_options are for --beam_runner, which is not given")
    data = _data_config(flags)
    corpus = open_corpus(flags.input, data)
    output = OutputDirectory(flags.output)
    if claim(output, recipe_of(data, corpus)):
        print(f"already there: {_summary(output)}")
        return 0
    if flags.beam_runner:
        run_tasks = beam_tasks(flags.beam_runner, flags.beam_options, flags.num_workers)
    else:
        run_tasks = local_tasks(flags.num_workers)
    try:
        build_store(data, corpus, output, run_tasks, Progress(True))
    except KeyboardInterrupt:
        Progress(True).note("the same command goes on from here")
        raise
    print(_summary(output))
    return 0


def _check_together(flags: argparse.Namespace) -> None:
    """Checks that no flag is given that what is asked for would pass over."""
    stated = [f"--{name}" for name in ("verify", "inspect") if getattr(flags, name) is not None]
    others = [f"--{name}" for name in ("input", "tokenizer", "output") if getattr(flags, name) is not None]
    if stated and len(stated + others) > 1:
        raise UserError(f"{' and '.join(stated + others)} do not go together: {stated[0]} takes a finished store alone")
    if flags.json and flags.inspect is None:
        raise UserError("--json is for --inspect, which is not given")


def _data_config(flags: argparse.Namespace) -> ConfigDict:
    data = default().data
    data.path, data.tokenizer = flags.input, flags.tokenizer
    data.include, data.exclude = tuple(flags.include), tuple(flags.exclude)
    data.packed_rows = flags.packed_rows
    for name in _DATA_FLAGS:
        data[name] = getattr(flags, name)
    for name in ("max_malformed", "shard_megabytes"):
        if data[name] < 0:
            raise UserError(f"--{name} must be at least 0, not {data[name]}")
    if not 0 < data.eval_fraction < 1:
        raise UserError(f"--eval_fraction must be between 0 and 1, not {data.eval_fraction}")
    if flags.vocab_size is not None:
        if flags.tokenizer != TRAINED:
            raise UserError(f"--vocab_size is for --tokenizer {TRAINED}; {flags.tokenizer} has its own")
        data.tokenizer_vocab_size = flags.vocab_size
    return data


def _verify(path: Path) -> int:
    store = TokenStore(path)
    with Progress(True).stage("verifying", sum(shard.bytes for shard in store.shards)) as stage:
        store.verify(stage.advance)
    store.tokenizer  # noqa: B018  (checks its fingerprint)
    print(f"{len(store.shards)} shards and the tokenizer of {path} are as they were written")
    return 0


def _summary(output: OutputDirectory) -> str:
    manifest = output.read_json(MANIFEST_FILE)
    assert manifest is not None  # the store is finished
    splits, tokenizer = manifest["splits"], manifest["tokenizer"]
    tokens = sum(split["tokens"] for split in splits.values())
    return (
        f"{manifest['corpus']['documents']:,} documents, {tokens:,} tokens ({splits['eval']['tokens']:,} held out), "
        f"vocabulary {tokenizer['vocab_size']:,}, {tokenizer['bytes_per_token']:.3f} bytes per token, in {output.path}"
    )


if __name__ == "__main__":
    run_verb("prepare", main)
