"""`python -m latentjax.generate`: continues text with a trained model.

python -m latentjax.generate --checkpoint runs/quickstart --prompt "def " --temperature 0.8
python -m latentjax.generate --checkpoint exports/mine --prompts_file prompts.txt --max_new_tokens 64 --json
python -m latentjax.generate --checkpoint EleutherAI/pythia-160m --interactive
"""

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from latentjax.command_line import LineParser, split_overrides
from latentjax.errors import UserError, run_verb

if TYPE_CHECKING:
    from latentjax.generating import Generator
    from latentjax.training.completion import Sampling

_STREAMED_AT_ONCE = 4  # tokens between two pieces of text on the screen
_MOST_NEW_TOKENS = 128
_SHOWN_CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_SHOWN_CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.generate",
        description="Continue text: exact sequential decoding, every token preceded by its thoughts.",
        epilog="--config.mesh.AXIS=SIZE spreads the model over devices (default: one device).",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or a Hugging Face folder or hub id")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest that is whole)")
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt", nargs="+", metavar="TEXT", help="to be continued; several make a batch")
    prompts.add_argument("--prompts_file", type=Path, metavar="FILE", help="a prompt a line; .jsonl: JSON texts")
    prompts.add_argument("--interactive", action="store_true", help="read prompts from the terminal")
    choosing = parser.add_argument_group("choosing tokens")
    choosing.add_argument("--max_new_tokens", type=int, help=f"at most (default: {_MOST_NEW_TOKENS})")
    choosing.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest (default)")
    choosing.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: from all (default)")
    choosing.add_argument("--top_p", type=float, default=1.0, help="from the fewest with this probability (default: 1)")
    choosing.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    choosing.add_argument("--num_samples", type=int, default=1, help="of each prompt (default: 1)")
    choosing.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="ends a continuation; \\n and \\t are written so"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument(
        "--prefill_tolerance",
        type=float,
        help="relative change that a prompt's thoughts may still make when they count as solved (default: rounding)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each continuation, a line each")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the checkpoint or the prompts.
    """
    arguments, overrides = split_overrides(argv)
    flags = _parser().parse_args(arguments)
    _check(flags)
    from latentjax.generating import open_generator, read_prompts
    from latentjax.training import processes
    from latentjax.training.completion import Sampling

    processes.refuse_several("generate")
    sampling = Sampling(flags.temperature, flags.top_k, flags.top_p, flags.seed)
    sampling.check()
    prompts = list(flags.prompt or ())
    if flags.prompts_file is not None:
        prompts += read_prompts(flags.prompts_file)
    generator = open_generator(
        flags.checkpoint, flags.step, flags.dtype, overrides, lambda line: print(line, file=sys.stderr, flush=True)
    )
    if flags.interactive:
        return _converse(generator, flags, sampling)
    if len(prompts) * flags.num_samples == 1 and not flags.json:
        return _stream(generator, prompts[0], flags, sampling)
    return _print_all(generator, prompts, flags, sampling)


def _check(flags: argparse.Namespace) -> None:
    given = [name for name in ("prompt", "prompts_file") if getattr(flags, name) is not None]
    if flags.interactive and (given or flags.json or flags.num_samples != 1):
        raise UserError("--interactive reads prompts from the terminal: leave out --prompt, --json and --num_samples")
    if not flags.interactive and not given:
        raise UserError("nothing to continue: give --prompt TEXT, --prompts_file FILE or --interactive")
    if flags.max_new_tokens is not None and not 1 <= flags.max_new_tokens < 2**31:
        raise UserError(f"--max_new_tokens must be at least 1, not {flags.max_new_tokens}")
    if not 1 <= flags.num_samples < 2**31:
        raise UserError(f"--num_samples must be at least 1, not {flags.num_samples}")
    if flags.num_samples > 1 and flags.temperature == 0:
        raise UserError("--num_samples would all be the same: give a --temperature above 0")
    if flags.prefill_tolerance is not None and not 0 <= flags.prefill_tolerance < 1:
        raise UserError(f"--prefill_tolerance must be from 0 to below 1, not {flags.prefill_tolerance}")
    flags.stop = [stop.replace("\\n", "\n").replace("\\t", "\t") for stop in flags.stop]
    if not all(flags.stop):
        raise UserError("--stop is empty: give a text that ends a continuation")


def _room_behind(generator: "Generator", prompts: Sequence[str], flags: argparse.Namespace) -> int:
    """How many tokens to generate: what was asked for, else as many as fit, up to the default."""
    if flags.max_new_tokens is not None:
        return flags.max_new_tokens
    return max(1, min(_MOST_NEW_TOKENS, generator.max_length - max(len(generator.encode(each)) for each in prompts)))


def _say(text: str) -> None:
    # A terminal obeys control characters, which models that know bytes write now and then: they are shown instead.
    sys.stdout.write(text.translate(_SHOWN_CONTROLS) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _stream(generator: "Generator", prompt: str, flags: argparse.Namespace, sampling: "Sampling") -> int:
    """Writes the prompt, and what follows as it comes."""
    num_tokens = _room_behind(generator, [prompt], flags)
    generator.encode_all([prompt], num_tokens)  # a prompt that is refused is not written
    _say(prompt)
    generator.generate(
        [prompt],
        num_tokens,
        sampling,
        stops=flags.stop,
        on_text=lambda index, text: _say(text),
        tokens_at_once=_STREAMED_AT_ONCE,
        prefill_tolerance=flags.prefill_tolerance,
    )
    _say("\n")
    return 0


def _print_all(generator: "Generator", prompts: Sequence[str], flags: argparse.Namespace, sampling: "Sampling") -> int:
    """Writes all continuations when they are there, in the order of the prompts."""
    from latentjax.training.progress import counting

    num_tokens = _room_behind(generator, prompts, flags)
    with counting("generating tokens", len(prompts) * flags.num_samples * num_tokens) as advance:
        results = generator.generate(
            prompts,
            num_tokens,
            sampling,
            num_samples=flags.num_samples,
            stops=flags.stop,
            on_tokens=advance,
            prefill_tolerance=flags.prefill_tolerance,
        )
    for number, result in enumerate(results):
        if flags.json:
            print(json.dumps(dataclasses.asdict(result), ensure_ascii=False))
        else:
            print(f"{'' if number == 0 else '-' * 80 + chr(10)}{result.prompt}{result.text}")
    return 0


def _converse(generator: "Generator", flags: argparse.Namespace, sampling: "Sampling") -> int:
    """Continues one line after another. Ctrl-C ends a continuation, or drops what was typed; Ctrl-D the program."""
    with contextlib.suppress(ImportError):  # some builds of Python have none
        import readline  # noqa: F401 - gives `input` its line editing

    print("Type a prompt; Ctrl-C ends its continuation, Ctrl-D leaves.", file=sys.stderr)
    for number in range(2**32):
        try:
            prompt = input("> ")
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:  # one that came a moment too late must not end it all
            print(file=sys.stderr)
            continue
        try:
            _stream(generator, prompt, flags, dataclasses.replace(sampling, seed=(sampling.seed + number) % 2**32))
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"latentjax.generate: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_verb("generate", main)
