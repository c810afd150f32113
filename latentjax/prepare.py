"""`python -m latentjax.prepare`: tokenises a raw corpus into a token store, once, for many runs to read.

python -m latentjax.prepare --input corpus/ --include '**/*.py' --tokenizer sentencepiece --output stores/mine
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from latentjax.command_line import LineParser
from latentjax.config import default
from latentjax.data.progress import Progress
from latentjax.data.resolve import build_store, open_corpus, recipe_of
from latentjax.data.store import TokenStore, is_store
from latentjax.errors import UserError, run_verb


def _parser() -> LineParser:
    data = default().data
    parser = LineParser(
        prog="python -m latentjax.prepare",
        description="Tokenise a raw corpus into a token store.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--input", required=True, help="a text file, a .jsonl(.gz) file, or a directory of such files")
    parser.add_argument("--tokenizer", required=True, help="bytes, sentencepiece (trained here) or a .model file")
    parser.add_argument("--output", required=True, type=Path, help="the token store: a directory to be made")
    parser.add_argument(
        "--vocab_size", type=int, help=f"of the sentencepiece model trained here ({data.tokenizer_vocab_size} if unset)"
    )
    parser.add_argument(
        "--include", nargs="+", default=data.include, metavar="GLOB", help="files of a directory to read"
    )
    parser.add_argument(
        "--exclude", nargs="+", default=data.exclude, metavar="GLOB", help="files and directories to leave out again"
    )
    parser.add_argument("--text_field", default=data.text_field, help="the field of a JSON line that holds its text")
    parser.add_argument(
        "--eval_fraction", type=float, default=data.eval_fraction, help="share of documents held out for evaluation"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="processes that tokenise; the result is the same")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the corpus or the output.
    """
    flags = _parser().parse_args(argv)
    data = default().data
    data.path, data.tokenizer, data.text_field = flags.input, flags.tokenizer, flags.text_field
    data.include, data.exclude = tuple(flags.include), tuple(flags.exclude)
    data.eval_fraction = flags.eval_fraction
    if flags.vocab_size is not None:
        if flags.tokenizer != "sentencepiece":
            raise UserError(f"--vocab_size is for --tokenizer sentencepiece; {flags.tokenizer} has its own")
        data.tokenizer_vocab_size = flags.vocab_size

    corpus = open_corpus(data)
    output = flags.output.expanduser()
    if output.is_dir() and is_store(output) and TokenStore(output).recipe == recipe_of(data, corpus):
        print(f"already there: {_summary(TokenStore(output))}")
        return 0
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {flags.output} is in use, and not by this store: remove it or choose another place")
    store = build_store(data, corpus, output, num_workers=flags.num_workers, progress=Progress(True))
    print(_summary(store))
    return 0


def _summary(store: TokenStore) -> str:
    train, held_out = store.split("train"), store.split("eval")
    tokens, text_bytes = train.num_tokens + held_out.num_tokens, train.num_bytes + held_out.num_bytes
    documents = store.manifest["corpus"]["documents"]
    return (
        f"{documents:,} documents, {tokens:,} tokens ({held_out.num_tokens:,} held out), vocabulary "
        f"{store.vocab_size:,}, {text_bytes / tokens:.3f} bytes per token, in {store.path}"
    )


if __name__ == "__main__":
    run_verb("prepare", main)
