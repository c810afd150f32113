"""`python -m latentjax.export`: writes a model as a Hugging Face folder that transformers loads.

python -m latentjax.export --checkpoint runs/quickstart --output exports/quickstart
python -m latentjax.export --checkpoint runs/mine --step 2000 --output exports/mine --dtype bfloat16
python -m latentjax.export --checkpoint runs/mine --output exports/mine --push_to_hub NAME/mine

Exit status: 0 written and compared, 1 transformers computes something else (nothing is left), 2 a mistake.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from latentjax.command_line import LineParser
from latentjax.errors import run_verb


def _parser() -> LineParser:
    parser = LineParser(
        prog="python -m latentjax.export",
        description="Write a model as a Hugging Face folder, and compare what transformers computes from it with ours.",
        allow_abbrev=False,
    )
    parser.add_argument("--checkpoint", required=True, help="a run's directory, or a Hugging Face folder or hub id")
    parser.add_argument("--step", type=int, help="of a run's checkpoint (default: the newest that is whole)")
    parser.add_argument("--output", required=True, type=Path, help="the folder to make; it must not be there")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the tensors")
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of tensors, such as 500MB (default: 5GB)")
    parser.add_argument("--no_check", action="store_true", help="do not compare with transformers, which needs torch")
    parser.add_argument("--push_to_hub", metavar="REPO", help="also upload the folder to the Hugging Face hub")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the verb and returns its exit status.

    Raises:
      UserError: anything wrong with the flags, the checkpoint, the output or the hub.
    """
    flags = _parser().parse_args(argv)
    from latentjax.exporting import ExportRequest, export
    from latentjax.interop.hub_upload import check_repository, push
    from latentjax.interop.writing import parse_size
    from latentjax.training import processes

    processes.refuse_several("export")
    request = ExportRequest(
        checkpoint=flags.checkpoint,
        step=flags.step,
        output=flags.output.expanduser(),
        dtype=flags.dtype,
        max_shard_bytes=parse_size(flags.max_shard_size),
        checked=not flags.no_check,
        name=flags.push_to_hub or str(flags.output),
    )
    if flags.push_to_hub is not None:
        check_repository(flags.push_to_hub)
    result = export(request, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result.as_json()) if flags.json else result.line())
    if not result.is_good:
        return 1
    if flags.push_to_hub is not None:
        print(f"uploaded: {push(request.output, flags.push_to_hub)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_verb("export", main)
