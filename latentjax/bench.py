"""`python -m latentjax.bench`: how fast the parts of the framework are, as ratios taken in one run.

python -m latentjax.bench data
python -m latentjax.bench step --config configs/pile_70m.py --thoughts 0 1 2
python -m latentjax.bench peer --config configs/pile_70m.py
python -m latentjax.bench checkpoint --config configs/pile_70m.py
python -m latentjax.bench scoring --config configs/pile_70m.py --config.model.dtype=float32
python -m latentjax.bench generate --config configs/pile_70m.py --config.model.dtype=float32
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentjax.command_line import LineParser, split_overrides
from latentjax.errors import UserError, brief, run_verb, shown

if TYPE_CHECKING:
    from ml_collections import ConfigDict

_DOES_NOT_FIT = 3  # status of a process that was to try a batch size
_LARGEST_BATCH = 1 << 16
_LARGEST_NUMBER = 2**31 - 1  # of flags


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.bench", description="Measure speed, as ratios taken in one run.", allow_abbrev=False
    )
    parts = parser.add_subparsers(dest="part", required=True)
    settings = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter, "allow_abbrev": False}

    text = "preparing stores and reading batches from them, against the plainest way of doing the same"
    data = parts.add_parser("data", help=text, description=text, **settings)
    data.add_argument("--text_megabytes", type=int, default=100, help="text to tokenise")
    data.add_argument("--store_megabytes", type=int, default=2000, help="size of the store to read")
    data.add_argument("--tokenizer", default="", help="path of one to measure instead of two trained here")
    data.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes that tokenise")
    data.add_argument("--sequence_length", type=int, default=2048, help="tokens of a window")
    data.add_argument("--batch_size", type=int, default=32, help="windows of a batch")
    data.add_argument("--rounds", type=int, default=5, help="times that everything is measured, in turns")
    data.add_argument("--directory", type=Path, help="where to put files; unset: a temporary directory")

    text = "training steps of every R that a recipe draws, next to the work that they do; on random tokens"
    step = parts.add_parser("step", help=text, description=text, **settings)
    step.add_argument("--thoughts", type=int, nargs="+", default=[], metavar="C", help="in place of the recipe's")

    text = "training steps against the same ones in PyTorch, on the stock GPT-NeoX model of transformers"
    peer = parts.add_parser("peer", help=text, description=text, **settings)
    peer.add_argument("--largest_batch", action="store_true", help="also seek the largest batch that fits each (GPU)")
    peer.add_argument("--fits", choices=("ours", "peer"), help=argparse.SUPPRESS)  # tries one batch size, in a process
    peer.add_argument("--variant", default="", help="of the peer, as its output names it; unset: the fastest")

    text = "training steps with checkpoints being saved, against the same ones with none; on random tokens"
    checkpoint = parts.add_parser("checkpoint", help=text, description=text, **settings)
    checkpoint.add_argument("--every", type=int, default=50, help="steps from one checkpoint to the next")
    checkpoint.add_argument("--directory", type=Path, help="where to put them; unset: a temporary directory")

    text = "scoring requests of the evaluation harness, against its own hf model on our export of the same weights"
    scoring = parts.add_parser("scoring", help=text, description=text, **settings)
    scoring.add_argument("--questions", type=int, default=6, help="of each of the tasks that requests are shaped after")
    scoring.add_argument("--batch_tokens", type=int, default=4096, help="tokens of our batches")

    text = "greedy generation, against generate of transformers on our export of the same weights"
    generate = parts.add_parser("generate", help=text, description=text, **settings)
    generate.add_argument("--batches", type=int, nargs="+", default=[1, 16], metavar="B", help="batch sizes")
    for name, count in (("prompt_tokens", 16), ("new_tokens", 128)):
        generate.add_argument(f"--{name}", type=int, default=count, help=f"default: {count}")
    for part in (step, peer, checkpoint, scoring, generate):
        part.add_argument("--config", required=True, help="a recipe; its knobs are set with --config.GROUP.KEY=VALUE")
        part.add_argument("--rounds", type=int, default=5, help="turns that every program has")
    for part in (step, peer):
        part.add_argument("--steps", type=int, default=2, help="training steps of a turn")
    for part in (data, step, peer, checkpoint, scoring, generate):
        part.add_argument("--json", action="store_true", help="print the results as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns 1 if a promised figure is missed or no largest batch was found.

    Raises:
      UserError: anything wrong with the flags or the config.
    """
    arguments, overrides = split_overrides(argv)
    flags = _parser().parse_args(arguments)
    numbers = {**vars(flags), "batches": min(getattr(flags, "batches", [1]))}
    for name, value in numbers.items():
        if type(value) is int and not 1 <= value <= _LARGEST_NUMBER:
            bound = "at least 1" if value < 1 else f"at most {_LARGEST_NUMBER}"
            raise UserError(f"--{name} must be {bound}, not {shown(value)}")
    if flags.part == "data" and overrides:
        raise UserError(f"--config.{brief(overrides[0])}: bench data reads no config; leave it out")
    if flags.part == "data":
        return _bench_data(flags)
    parts = {"step": _bench_step, "peer": _bench_peer, "checkpoint": _bench_checkpoint}
    return parts.get(flags.part, _bench_use)(flags, overrides)


def _bench_data(flags: argparse.Namespace) -> int:
    _check_store(flags)
    # Here and not above: the processes that are measured import this module too.
    from latentjax.data.benchmark import as_json, benchmark_memory, benchmark_reading, benchmark_tokenising, write_store
    from latentjax.data.progress import Progress

    progress, sources = Progress(True), Path(sysconfig.get_path("stdlib"))
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
        _print_json([as_json(result) for result in results])
    else:
        print(f"{'':<58} {'ours':>10} {'theirs':>10} {'':<10} {'ratio':>6}  promised")
        for result in results:
            print(result.line())
    return 0 if all(result.holds for result in results) else 1


def _check_store(flags: argparse.Namespace) -> None:
    """Checks the sizes that `bench data` was given, against each other and the disk, before files are written."""
    tokens = flags.store_megabytes * 10**6 // 2  # of two bytes
    if flags.batch_size * (flags.sequence_length + 1) > tokens:
        raise UserError(
            f"a batch of --batch_size={flags.batch_size} windows of --sequence_length={flags.sequence_length} tokens "
            f"is more than a store of --store_megabytes={flags.store_megabytes} holds: lower one of them"
        )
    if flags.tokenizer:
        from latentjax.data.tokenizers.saved import read_tokenizer

        read_tokenizer(flags.tokenizer)
    free = _free_megabytes(flags.directory)
    needed = 2 * flags.store_megabytes + 4 * flags.text_megabytes  # the store and its plain twin; text and its stores
    if needed > free:
        raise UserError(
            f"--store_megabytes={flags.store_megabytes} and --text_megabytes={flags.text_megabytes} take about "
            f"{needed} MB of disk, and {free} are free: lower them, or name another --directory"
        )


def _free_megabytes(directory: Path | None) -> int:
    """Makes the directory that was given, if any, and returns the space on its disk in MB."""
    try:
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(directory or tempfile.gettempdir()).free // 10**6
    except OSError as error:
        raise UserError(f"cannot write to --directory {directory}: {error.strerror}") from error


def _bench_step(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    negative = [count for count in flags.thoughts if count < 0]
    if negative:
        raise UserError(f"--thoughts: C must be at least 0, not {negative[0]}")
    _treat_memory_as_the_trainer_does()
    config = _load(flags, overrides)
    from latentjax.validation import validate

    for count in flags.thoughts:
        validate(_with_thoughts(config, count))
    from latentjax.training import processes

    processes.start(None, None, None)
    from latentjax.training import step_benchmark
    from latentjax.training.circumstances import circumstance_lines, circumstances

    results = step_benchmark.benchmark_steps(config, sorted(set(flags.thoughts)), flags.rounds, flags.steps)
    compared = step_benchmark.proportions(results)
    if not processes.is_first():
        return 0
    if flags.json:
        derived = ("median", "best", "mfu", "tokens_per_second", "slots_per_second")
        programs = [asdict(result) | {name: getattr(result, name) for name in derived} for result in results]
        ratios = [asdict(each) | {"holds": each.holds} for each in compared]
        _print_json({**circumstances(config), "programs": programs, "ratios": ratios})
    else:
        print(*circumstance_lines(config), sep="\n")
        print(step_benchmark.HEADER, *(result.line() for result in results), sep="\n")
        print(f"planned: by the compiler, per device; peak: {results[0].peak_source or 'not told by this platform'}")
        if compared:
            print(step_benchmark.PROPORTION_HEADER, *(each.line() for each in compared), sep="\n")
    return 0 if all(each.holds for each in compared) else 1


def _bench_checkpoint(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    _treat_memory_as_the_trainer_does()
    config = _load(flags, overrides)
    _free_megabytes(flags.directory)
    from latentjax.training.checkpoint_benchmark import benchmark_saving
    from latentjax.training.circumstances import circumstance_lines, circumstances

    with tempfile.TemporaryDirectory(prefix="latentjax-bench-", dir=flags.directory) as name:
        times = benchmark_saving(config, Path(name), flags.every, flags.rounds)
    if flags.json:
        _print_json({**circumstances(config), **asdict(times), "ratio": times.ratio, "holds": times.holds})
    else:
        print(*circumstance_lines(config), *times.lines(), sep="\n")
    return 0 if times.holds else 1


def _bench_peer(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the peer needs memory as well
    _treat_memory_as_the_trainer_does()
    config = _load(flags, overrides)
    from latentjax.interop.torch_peer import check_peer
    from latentjax.models.spec import ModelSpec
    from latentjax.recurrence.base import RecurrenceSpec

    check_peer(ModelSpec(**config.model), RecurrenceSpec(**config.recurrence))
    if flags.fits:
        return 0 if _fits(config, flags.fits, flags.variant) else _DOES_NOT_FIT
    report = _compare_in_a_process(flags, overrides) if flags.largest_batch else _compare(config, flags)
    failure = None
    if flags.largest_batch:
        try:
            report["largest_batch"] = _largest_batches(flags, overrides, report)
        except UserError as error:  # the comparison stands all the same
            failure = error
    if flags.json:
        _print_json(report)
    else:
        print(*report["text"], sep="\n")
        for side, rows in report.get("largest_batch", {}).items():
            print(f"largest batch, {side}: {'not one sequence fits' if rows == 0 else rows}")
    if failure is None:
        return 0
    print(f"latentjax.bench: {failure}", file=sys.stderr)
    return 1


def _bench_use(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
    """Scoring or generation."""
    _treat_memory_as_the_trainer_does()
    config = _load(flags, overrides)
    from latentjax.generation_benchmark import benchmark_generation
    from latentjax.scoring_benchmark import benchmark_scoring
    from latentjax.training.circumstances import circumstance_lines, circumstances

    if flags.part == "scoring":
        found = [benchmark_scoring(config, flags.questions, flags.batch_tokens, flags.rounds)]
    else:
        found = benchmark_generation(config, flags.batches, flags.prompt_tokens, flags.new_tokens, flags.rounds)
    if flags.json:
        _print_json({**circumstances(config), "results": [times.as_json() for times in found]})
    else:
        print(*circumstance_lines(config), *(line for times in found for line in times.lines()), sep="\n")
    return 0 if all(times.holds for times in found) else 1


def _compare(config: "ConfigDict", flags: argparse.Namespace) -> dict[str, Any]:
    """Both sides' times on the first device, as JSON has them; `text` is what is printed for people."""
    import jax

    from latentjax.data.progress import Progress
    from latentjax.interop import torch_peer
    from latentjax.training import peer_benchmark
    from latentjax.training.circumstances import circumstance_lines, circumstances

    platform = jax.devices()[0].platform
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    device = torch_peer.use_device(platform, threads)
    maker = _peer_maker(device, flags.variant)
    agreement, times = peer_benchmark.compare(config, maker, flags.rounds, flags.steps, Progress(True))
    lines = [
        *circumstance_lines(config),
        f"peer: {times.variant}; {', '.join(map(' '.join, torch_peer.versions().items()))}, {threads} CPU threads",
        agreement.line(),
        f"first loss as timed: {times.loss:.4f}, peer {times.peer_loss:.4f}; R = {times.num_jacobi_iterations}",
        *times.lines(),
    ]
    report = circumstances(config) | asdict(times) | {"agreement": asdict(agreement), "text": lines}
    report["versions"] |= torch_peer.versions()
    return report | {"best_ratio": times.best_ratio, "median_ratio": times.median_ratio, "cpu_threads": threads}


def _compare_in_a_process(flags: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """As `_compare`, in a process that gives all its device memory back when it ends."""
    command = [*_command(flags, overrides), "--json", f"--variant={flags.variant}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        raise UserError(f"the comparison ended with status {result.returncode}; no larger batches were tried")
    return json.loads(result.stdout)


def _largest_batches(flags: argparse.Namespace, overrides: Sequence[str], report: dict[str, Any]) -> dict[str, int]:
    if report["platform"] == "cpu":
        raise UserError("--largest_batch: on a CPU nothing says when memory runs out; it needs a GPU")
    return {
        "ours": _largest_batch(flags, overrides, "ours", ""),
        "peer": _largest_batch(flags, overrides, "peer", report["variant"]),
    }


def _largest_batch(flags: argparse.Namespace, overrides: Sequence[str], side: str, variant: str) -> int:
    """Seeks the largest batch, each size in a process of its own; 0: not one sequence fits."""
    from latentjax.training.peer_benchmark import largest_that_fits

    # jax would leave a quarter of the memory alone; and where the peer is tried, it shall take none.
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} if side == "ours" else {"JAX_PLATFORMS": "cpu"}

    def fits(rows: int) -> bool:
        sized = [*overrides, f"data.batch_size={rows}", "train.gradient_accumulation_steps=1"]
        command = [*_command(flags, sized), f"--fits={side}", f"--variant={variant}"]
        result = subprocess.run(command, env=os.environ | memory, capture_output=True, text=True, check=False)
        answers = {0: "fits", _DOES_NOT_FIT: "does not fit"}
        said = (result.stderr.strip().splitlines() or [""])[-1][:300]
        answer = answers.get(result.returncode, f"ended with status {result.returncode}: {said}")
        print(f"{side}, a batch of {rows}: {answer}", file=sys.stderr, flush=True)
        if rows == 1 and result.returncode not in answers:
            raise UserError(f"{side} cannot be tried with a batch of 1: {said}")
        return result.returncode == 0

    return largest_that_fits(fits, _LARGEST_BATCH)


def _fits(config: "ConfigDict", side: str, variant: str) -> bool:
    from latentjax.interop import torch_peer
    from latentjax.training import peer_benchmark

    if side == "ours":
        return peer_benchmark.our_step_fits(config)
    maker = _peer_maker("cuda", variant)
    return peer_benchmark.peer_step_fits(config, maker, torch_peer.is_out_of_memory)


def _peer_maker(device: str, variant: str) -> Any:
    """Hands the room that knows PyTorch to the one that measures."""
    from latentjax.interop import torch_peer
    from latentjax.interop.pretrained import tensors_from_params
    from latentjax.training.peer_benchmark import PeerMaker

    def make(config: "ConfigDict", spec: Any, recurrence_spec: Any, tensors: Any, iterations: int, variant: Any) -> Any:
        knobs = config.optimizer
        settings = torch_peer.StepSettings(
            num_jacobi_iterations=iterations,
            gradient_accumulation_steps=config.train.gradient_accumulation_steps,
            loss_chunk_tokens=config.train.loss_chunk_tokens,
            **{name: knobs[name] for name in ("b1", "b2", "eps", "weight_decay", "clip_norm")},
        )
        return torch_peer.TorchPeer(spec, recurrence_spec, tensors, settings, variant, device)

    return PeerMaker(
        make=make,
        variants=partial(torch_peer.variants, only=variant),
        check_variant=torch_peer.Variant("float32", compiled=False),
        tensors=tensors_from_params,
    )


def _load(flags: argparse.Namespace, overrides: Sequence[str]) -> "ConfigDict":
    from latentjax import config as config_lib
    from latentjax.validation import validate

    config = config_lib.load(flags.config, overrides)
    validate(config)
    return config


def _with_thoughts(config: "ConfigDict", count: int) -> "ConfigDict":
    changed = config.copy_and_resolve_references()
    changed.recurrence.update(num_latent_thoughts=count, train_schedule=(), handover_ratio=0.0)
    return changed


def _treat_memory_as_the_trainer_does() -> None:
    """On a CPU, before jax or PyTorch start; what is measured beside it in the same process has the benefit as well."""
    from latentjax.training import host_memory

    if host_memory.computes_on_cpu():
        host_memory.keep_freed_memory()


def _command(flags: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The command line of a process that measures the same recipe."""
    command = [sys.executable, "-m", "latentjax.bench", flags.part, "--config", flags.config]
    return [*command, f"--rounds={flags.rounds}", f"--steps={flags.steps}", *(f"--config.{each}" for each in overrides)]


def _print_json(results: Any) -> None:
    json.dump(results, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    run_verb("bench", main)
