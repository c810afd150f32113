"""Finding a model's folder: on this machine, or in the Hugging Face hub, of which only what is read is fetched."""

import re
from pathlib import Path

from latentjax.errors import UserError, brief, shown
from latentjax.interop.hf_config import read_json

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json")
_SMALL_FILES = (CONFIG, INDEX, "generation_config.json", "latentjax_tokenizer.json", *_TOKENIZER_FILES)
# NAME or OWNER/NAME, as the hub allows them; what is written as a path (./x, /x, a/b/c) never is one.
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)?")


def find_folder(name: str | Path) -> Path:
    """Returns the folder of a model.

    Args:
      name: a directory, or, where there is none of that name, an id of the hub, as EleutherAI/pythia-70m.

    Raises:
      UserError: it is neither, or the hub does not give it.
    """
    path = Path(name).expanduser()
    try:
        if path.is_dir():
            return path
        is_file = path.exists()
    except (OSError, ValueError) as error:  # a name too long, a zero byte
        raise UserError(f"there is no model at {shown(str(name), 200)}: {brief(error)}") from error
    if is_file:
        raise UserError(f"{path} is a file: give the directory that it is in")
    if not _HUB_ID.fullmatch(str(name)) or ".." in str(name) or len(str(name)) > 96:
        raise UserError(
            f"there is no directory {shown(str(name), 200)}, and it is no id of the Hugging Face hub either: give a "
            "model's directory, or an id such as EleutherAI/pythia-70m"
        )
    return _fetched(str(name))


def weight_files(folder: Path) -> list[str]:
    """Returns the names of a folder's safetensors files: those that its index names, or the one.

    Raises:
      UserError: the index is damaged or names other files.
    """
    index = folder / INDEX
    if not index.exists():
        return [WEIGHTS]
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: 'weight_map' is missing, or does not say which tensor is in which file")
    for name in places.values():
        # A name that leads out of the folder would have any file of this machine read.
        if not isinstance(name, str) or not name.endswith(".safetensors") or Path(name).name != name:
            raise UserError(f"{index}: the weight map names {shown(name)}, which is no safetensors file beside it")
    return sorted(set(places.values()))


def _fetched(repository: str) -> Path:
    """Fetches what is read of a model into the hub's own cache; what is there already is not fetched again."""
    from huggingface_hub import errors, snapshot_download  # slow to import, and only here

    def fetch(patterns: list[str], revision: str | None = None) -> Path:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))

    try:
        folder = fetch(list(_SMALL_FILES))
        # The folder is named by the commit: weights of the same one, whatever is pushed meanwhile.
        return fetch([*_SMALL_FILES, *weight_files(folder)], folder.name)
    except errors.GatedRepoError as error:
        reason = "its owner gives it out on request only: ask on its page, and log in with `hf auth login`"
        raise UserError(f"the hub does not give {repository}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"there is no directory {repository}, and the hub has no public model of that name (or it is private: "
            "`hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise UserError(
            f"there is no directory {repository}, and as a model of the Hugging Face hub it can be fetched only where "
            "the hub can be reached: give a directory, or fetch it elsewhere"
        ) from error
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise UserError(f"the model {repository} cannot be fetched from the hub: {brief(error, 200)}") from error
