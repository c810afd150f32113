"""`python -m latentjax.bench`: how fast the parts of the framework are, against the plainest way of doing the same.

python -m latentjax.bench data
"""

import argparse
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from latentjax.command_line import LineParser
from latentjax.data.progress import Progress
from latentjax.errors import UserError, run_verb


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.bench",
        description="Measure speed, as ratios taken in one run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("part", choices=("data",), help="data: preparing stores and reading batches from them")
    parser.add_argument("--text_megabytes", type=int, default=100, help="text to tokenise")
    parser.add_argument("--store_megabytes", type=int, default=2000, help="size of the store to read")
    parser.add_argument("--tokenizer", default="", help="path of one to measure instead of two trained here")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that tokenise")
    parser.add_argument("--sequence_length", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--batch_size", type=int, default=32, help="windows of a batch")
    parser.add_argument("--rounds", type=int, default=5, help="times that everything is measured, in turns")
    parser.add_argument("--directory", type=Path, help="where to put files; unset: a temporary directory")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 1 if a promised figure is missed.

    Raises:
      UserError: anything wrong with the flags.
    """
    flags = _parser().parse_args(argv)
    for name in ("text_megabytes", "store_megabytes", "num_workers", "sequence_length", "batch_size", "rounds"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(flags, name)}")
    # Here and not above: the processes that are measured import this module too.
    from latentjax.data.benchmark import as_json, benchmark_memory, benchmark_reading, benchmark_tokenising, write_store

    progress, sources = Progress(True), Path(sysconfig.get_path("stdlib"))
    if flags.directory is not None:
        flags.directory.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="latentjax-bench-", dir=flags.directory) as name:
        directory = Path(name)
        split, plain = write_store(sources, directory, flags.store_megabytes)
        results += benchmark_reading(split, plain, flags.sequence_length, flags.batch_size, flags.rounds, progress)
        results.append(benchmark_memory(split, flags.sequence_length, flags.batch_size))
        results += benchmark_tokenising(
            sources, directory, flags.text_megabytes, flags.num_workers, flags.tokenizer, flags.rounds, progress
        )
    if flags.json:
        json.dump([as_json(result) for result in results], sys.stdout, indent=2)
        print()
    else:
        print(f"{'':<58} {'ours':>10} {'theirs':>10} {'':<10} {'ratio':>6}  promised")
        for result in results:
            print(result.line())
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    run_verb("bench", main)
