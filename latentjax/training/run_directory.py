"""A run's directory: what is in it, and whether this config may continue it."""

import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import socket
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from latentjax import config as config_lib
from latentjax.data.tokenizers.base import Tokenizer
from latentjax.data.tokenizers.saved import load_tokenizer
from latentjax.errors import UserError, brief

TOKENIZER = "tokenizer"  # where a run keeps its tokenizer: the store that it was made with may be gone one day
PACKAGES = ("latentjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# A run keeps these: with another value its checkpoint would not fit, or would mean something else.
FIXED_KEYS = tuple(
    f"model.{key}"
    for key in (
        "architecture", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "intermediate_size", "vocab_size",
        "rotary_fraction", "rope_theta", "parallel_residual", "norm_epsilon", "tie_embeddings",
    )
) + tuple(f"recurrence.{key}" for key in ("method", "num_latent_thoughts", "scale_embeddings"))  # fmt: skip
FIXED_KEYS_OF_METHOD = {"pause": ("recurrence.pause_token_id",)}


def claim(workdir: Path, config: ConfigDict) -> tuple[list[str], TextIO]:
    """Makes the directory, or checks that the run in it has the same model; locks it, and writes config.json.

    Returns:
      One line for each knob that differs from the last time the run was started, and the lock: the directory belongs to
      this process until that is closed, or the process ends in whatever way.

    Raises:
      UserError: the directory cannot be written, holds a run of another model, or another process is at work in it.
    """
    path = workdir / "config.json"
    changes = _changes(path, workdir, config) if path.exists() else []
    try:
        (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock = _lock(workdir)
        write_whole(path, config_lib.to_json(config))
    except OSError as error:
        raise UserError(f"cannot write to --workdir {workdir}: {error.strerror or error}") from error
    return changes, lock


def _changes(path: Path, workdir: Path, config: ConfigDict) -> list[str]:
    before = config_lib.values_from_json(_read(path), str(path))
    fixed = FIXED_KEYS + FIXED_KEYS_OF_METHOD.get(config.recurrence.method, ())
    changes = []
    for key, value in config_lib.flatten(config).items():
        # A knob that the version which began the run did not have is reported like one that was changed.
        if key in before and before[key] == value:
            continue
        was = repr(before[key]) if key in before else "not known"
        if key in fixed:
            raise UserError(
                f"{workdir} holds a run of another model: {key} was {was} there and is {value!r} now; "
                "give another --workdir, or the config that made it"
            )
        changes.append(f"{key}: {was} before, {value!r} from here on")
    return changes


def _lock(workdir: Path) -> TextIO:
    """Takes the lock, which the system itself takes back when the process ends."""
    lock = (workdir / "lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read(200).strip() or "another process"
        lock.close()
        raise UserError(
            f"{workdir} is in use by {holder}: wait until that run has ended, stop it, or give another --workdir"
        ) from None
    except OSError:
        lock.close()
        raise
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {brief(error)}; give another --workdir") from error


def keep_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Puts the tokenizer's files into the directory, if they are not there.

    Raises:
      UserError: they cannot be written.
    """
    place, partial = workdir / TOKENIZER, workdir / f"{TOKENIZER}.partial"
    try:
        if place.exists() and load_tokenizer(place).fingerprint == tokenizer.fingerprint:
            return
    except UserError:
        pass  # damaged: written anew
    try:
        for old in (partial, place):
            shutil.rmtree(old, ignore_errors=True)
        tokenizer.save(partial)
        partial.replace(place)
    except OSError as error:
        raise UserError(f"cannot write {place}: {error.strerror or error}") from error


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_durably(path: Path, text: str) -> None:
    """As `write_whole`, and returns when the file is on disk: what is done next may count on it, whatever happens."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name too
    finally:
        os.close(directory)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run's numbers depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions


def write_summary(workdir: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json; a number that is not finite is null there."""
    finite = {
        key: None if isinstance(each, float) and not math.isfinite(each) else each for key, each in summary.items()
    }
    write_whole(workdir / "summary.json", json.dumps(finite, indent=2, allow_nan=False) + "\n")
