"""Opening a model to use it: from a run's checkpoints, or from a Hugging Face folder."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax import config as config_lib
from latentjax.data.resolve import known_tokenizer
from latentjax.data.tokenizers.base import DESCRIPTION_FILE, Tokenizer
from latentjax.data.tokenizers.huggingface import TOKENIZER_FILE
from latentjax.data.tokenizers.saved import load_tokenizer, read_tokenizer
from latentjax.data.tokenizers.sentence_piece import MODEL_FILE
from latentjax.errors import UserError, brief, shown
from latentjax.interop import pretrained
from latentjax.interop.hub import find_folder
from latentjax.interop.pretrained import read_model, read_params
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel
from latentjax.training import checkpoint_files, checkpoint_reading, programs, run_directory
from latentjax.training.mesh import arrange_mesh, check_model_divisible
from latentjax.training.state import abstract_params
from latentjax.validation import validate

DTYPES = ("float32", "bfloat16")
CONFIG = "config.json"  # of a run and of a Hugging Face folder alike


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model and its parameters on the devices.

    Attributes:
      model: computes in the dtype that was asked for, with attention that serves the mesh's devices.
      params: a pytree, sharded over the mesh by the rules of training.
      tokenizer: None where the folder has none.
      source: what was opened, for messages: "runs/mine, step 800".
      step: of a run; None for a folder.
      config: of a run, as it was last started; None for a folder.
      mesh: to be put in force around what is traced with the model (`training.programs.sharded_tracing`).
    """

    model: LanguageModel
    params: Any
    tokenizer: Tokenizer | None
    source: str
    step: int | None
    config: ConfigDict | None
    mesh: Mesh


def open_model(
    checkpoint: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    param_dtype: str = "float32",
    mesh: ConfigDict | Mesh | None = None,
    mask_documents: bool = False,
    note: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> OpenedModel:
    """Opens a model to use it. Nothing is changed where it is kept: a run may be training there.

    Args:
      checkpoint: the directory of a run; or a Hugging Face folder; or, where there is no directory of that name, an id
        of the hub.
      step: of a run's checkpoint; None: the newest that is whole.
      dtype: of activations and matmuls, one of DTYPES.
      param_dtype: of the parameters, likewise; they are kept and checked in float32, and rounded at last.
      mesh: the `mesh` group of a config, over all devices; or a mesh of `training.mesh`; None: the first device alone.
      mask_documents: whether attention has to keep documents apart.
      note: is told what a user should know, such as that a damaged checkpoint is passed over.

    Raises:
      UserError: nothing that can be opened is there, or it does not fit the mesh.
    """
    for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
        if value not in DTYPES:
            raise UserError(f"{name}={shown(value)} is not known: choose {' or '.join(DTYPES)}")
    if mesh is None:
        mesh = arrange_mesh(_one_device(), jax.local_devices()[:1])
    elif not isinstance(mesh, Mesh):
        mesh = arrange_mesh(mesh, jax.devices())
    found = find_model(checkpoint, step, note)
    # How a run was trained says nothing about the devices that are here, and nothing is differentiated.
    spec = dataclasses.replace(found.model.spec, dtype=dtype, attention="auto", loops="auto", remat="none")
    check_model_divisible(spec, tuple(mesh.shape.values()))
    model = LanguageModel(programs.resolved(spec, mesh, mask_documents), found.model.recurrence_spec)
    abstract = abstract_params(model, mesh)
    params, step, tokenizer = found.read(abstract)
    source = str(checkpoint) if step is None else f"{checkpoint}, step {step}"
    if param_dtype != "float32":
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        cast = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf.astype(param_dtype), tree), out_shardings=shardings)
        params = cast(params)
    return OpenedModel(model, params, tokenizer(), source, step, found.config, mesh)


@dataclasses.dataclass(frozen=True)
class FoundModel:
    """A model of which nothing but its description has been read.

    Attributes:
      model: as it is described there.
      config: of a run; None for a folder.
      read: from shapes, dtypes and shardings to the parameters, the step (None for a folder), and what gives the
        tokenizer (None if there is none).
    """

    model: LanguageModel
    config: ConfigDict | None
    read: Callable[[Any], tuple[Any, int | None, Callable[[], Tokenizer | None]]]


def find_model(checkpoint: str | Path, step: int | None, note: Callable[[str], None]) -> FoundModel:
    """Finds out what is there; arguments and errors as in `open_model`."""
    if not is_run(checkpoint):
        if step is not None:
            raise UserError(f"a step was given, {step}, but {checkpoint} is no run with checkpoints of several")
        folder = find_folder(checkpoint)
        model = read_model(folder)

        def read_folder(abstract: Any) -> tuple:
            with programs.memory_errors(f"reading {folder}"):
                params = read_params(folder, model.spec, abstract)
            return params, None, lambda: tokenizer_of_folder(folder)

        return FoundModel(model, None, read_folder)
    workdir = Path(checkpoint).expanduser()
    config = read_run_config(workdir)
    directory = checkpoint_files.directory_of(config.checkpoint.directory, workdir)

    def read_run(abstract: Any) -> tuple:
        found, params, notes = checkpoint_reading.read_params(directory, step, abstract, note)
        return params, found, lambda: tokenizer_of_run(workdir, config, notes.get("tokenizer"))

    return FoundModel(LanguageModel(ModelSpec(**config.model), RecurrenceSpec(**config.recurrence)), config, read_run)


def load_pretrained(directory: str | Path, *, mesh: ConfigDict | Mesh | None = None) -> tuple[LanguageModel, Any]:
    """Reads a GPT-NeoX, LLaMA or GPT-2 folder or hub id, plain or with latent thoughts; `open_model` does more.

    Args:
      mesh: as in `open_model`; None: the default device, uncommitted.

    Returns:
      The model, computing in float32, and its float32 params: `model.apply({"params": params}, tokens_BT)` gives
      logits. With a mesh, under `training.programs.sharded_tracing`.

    Raises:
      UserError: a missing or broken file, a config that is not implemented, missing, extra or misshapen tensors.
    """
    if mesh is None:
        return pretrained.load_pretrained(directory)
    opened = open_model(directory, mesh=mesh)
    return opened.model, opened.params


def is_run(checkpoint: str | Path) -> bool:
    """Returns whether this is the directory of a run; a Hugging Face folder has a config.json of another form."""
    path = Path(checkpoint).expanduser()
    try:
        if (path / CONFIG).is_file():
            content = json.loads((path / CONFIG).read_text(encoding="utf-8"))
            return isinstance(content, dict) and {"model", "recurrence"} <= content.keys()
        return (path / "checkpoints").is_dir()
    except (OSError, ValueError, RecursionError):
        return False  # what is wrong with it is found out, and said, when it is read as a folder


def read_run_config(workdir: Path) -> ConfigDict:
    """Returns the config that a run was last started with, by whatever version of latentjax.

    Raises:
      UserError: it is missing, damaged, or not one that this version could have.
    """
    path = workdir / CONFIG
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {brief(error)}; a run keeps its config there") from error
    config = config_lib.from_json(text, str(path), of_any_version=True)
    try:
        validate(config)
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return config


def tokenizer_of_run(workdir: Path, config: ConfigDict, fingerprint: str | None) -> Tokenizer | None:
    """Returns the tokenizer that a run was trained with, None if it is not to be found any more.

    Args:
      fingerprint: the one that its checkpoint names.

    Raises:
      UserError: the run's own copy is damaged.
    """
    place = workdir / run_directory.TOKENIZER
    if place.is_dir():
        tokenizer = load_tokenizer(place)
    else:  # a run of a version that kept no copy
        try:
            tokenizer = known_tokenizer(config.data)
        except UserError:
            return None
    return tokenizer if fingerprint in (None, tokenizer.fingerprint) else None


def tokenizer_of_folder(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer in a Hugging Face folder, None if there is none.

    Raises:
      UserError: its files are damaged, or of a tokenizer from whose ids the text cannot be told.
    """
    if (folder / DESCRIPTION_FILE).is_file():
        return load_tokenizer(folder)
    if any((folder / name).is_file() for name in (TOKENIZER_FILE, MODEL_FILE)):
        return read_tokenizer(folder)
    return None


def _one_device() -> ConfigDict:
    sizes = config_lib.default().mesh
    sizes.data = 1
    return sizes
