"""Writing Hugging Face model folders: whole or not at all, and one tensor at a time."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from latentjax.errors import UserError, brief, shown
from latentjax.interop.exported_config import CODE_FILES
from latentjax.interop.hub import CONFIG, INDEX, WEIGHTS
from latentjax.interop.names import name_table
from latentjax.models.spec import ModelSpec

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_STORED_AS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # how safetensors call them
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "latentjax_tokenizer.json",
)
_MARK = ".latentjax-export"  # in a folder that is not finished


def parse_size(text: str) -> int:
    """Reads a size such as 5GB, 500MB or 2GiB, as bytes.

    Raises:
      UserError: it is none, or nothing.
    """
    match = re.fullmatch(r"(\d{1,12})\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise UserError(f"--max_shard_size={shown(text)} is no size: write one such as 5GB, 500MB or 2GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields OUTPUT.partial to write into, which becomes OUTPUT at the end, and is removed if anything goes wrong.

    Raises:
      UserError: OUTPUT is there already, or cannot be written.
    """
    check_new(output)
    partial = output.with_name(output.name + ".partial")
    try:
        if partial.exists():
            if not (partial / _MARK).is_file():
                raise UserError(
                    f"{partial} is there, and no leftover of an export: remove it, or give another --output"
                )
            shutil.rmtree(partial)  # of an export that was killed
        partial.mkdir(parents=True)
        (partial / _MARK).touch()
        try:
            yield partial
            (partial / _MARK).unlink()
            partial.rename(output)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write --output {output}: {error.strerror or brief(error)}") from error


def check_new(output: Path) -> None:
    """Raises UserError if there is something at a path where a folder is to be made."""
    try:
        taken = output.exists() or output.is_symlink()
    except OSError as error:
        raise UserError(f"cannot write --output {output}: {error.strerror or brief(error)}") from error
    if taken:
        raise UserError(f"--output {output} is there already, and nothing is overwritten: give another, or remove it")


def write_weights(folder: Path, params: Any, spec: ModelSpec, dtype: str, max_shard_bytes: int) -> int:
    """Writes the parameters as model.safetensors, or as shards with an index; one tensor is on the host at a time.

    Args:
      params: float32 pytree.
      dtype: of DTYPES; 16-bit numbers are rounded to nearest.
      max_shard_bytes: of a file; a larger tensor has one of its own.

    Returns:
      The number of parameters.

    Raises:
      UserError: a number is too large for the dtype, or not finite.
    """
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    shards: list[dict[str, tuple[Any, str, int | None, tuple[int, ...]]]] = [{}]
    size, total = 0, 0
    for entry in name_table(spec):
        for name, parameter, row in entry.places(spec):
            shape = flat[parameter].shape if row is None else flat[parameter].shape[1:]
            stored = entry.write(np.broadcast_to(np.float32(0), shape), spec).shape
            num_bytes = int(np.prod(stored)) * DTYPES[dtype].itemsize
            if shards[-1] and size + num_bytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = entry, parameter, row, stored
            size, total = size + num_bytes, total + num_bytes
    names = [WEIGHTS] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        with (folder / file_name).open("wb") as file:
            _write_header(file, {name: place[3] for name, place in shard.items()}, dtype)
            for name, (entry, parameter, row, _) in shard.items():
                leaf = flat[parameter] if row is None else flat[parameter][row]
                file.write(_rounded(entry.write(np.asarray(leaf), spec), dtype, name).reshape(-1).view(np.uint8).data)
    if len(shards) > 1:
        places = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return total // DTYPES[dtype].itemsize


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_header(file: BinaryIO, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    """Length of the header (uint64), then the header: JSON with each tensor's place in what follows."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape)) * DTYPES[dtype].itemsize
        header[name] = {"dtype": _STORED_AS[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at multiples of 8
    file.write(len(text).to_bytes(8, "little") + text)


def _rounded(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array).astype(DTYPES[dtype])
    if not np.isfinite(stored).all():
        if np.isfinite(array).all():
            raise UserError(f"tensor {name!r} has numbers that {dtype} does not reach: choose another --dtype")
        raise UserError(f"tensor {name!r} has numbers that are not finite: the parameters are damaged")
    return stored


def copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copies the tokenizer of a folder as it is; returns whether there is one that AutoTokenizer knows."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def write_code(folder: Path) -> None:
    """Copies the code that `auto_map` names."""
    for name in CODE_FILES:
        source = resources.files("latentjax.interop.hf") / name
        (folder / name).write_bytes(source.read_bytes())


def write_configs(folder: Path, config: dict[str, Any], generation_config: dict[str, Any] | None = None) -> None:
    """Writes config.json, and generation_config.json: one that is given, or what the config says of special tokens."""
    write_json(folder / CONFIG, config)
    if generation_config is None:
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id")}
        ids["pad_token_id"] = config.get("eos_token_id")
        generation_config = {key: value for key, value in ids.items() if value is not None}
    write_json(folder / "generation_config.json", generation_config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
