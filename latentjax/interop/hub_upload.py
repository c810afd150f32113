"""Uploading a folder to the Hugging Face hub."""

from pathlib import Path

from latentjax.errors import UserError, brief, shown


def check_repository(name: str) -> None:
    """Raises UserError if this cannot be the name of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub={shown(name)} is no repository of the hub: {brief(error)}") from error


def push(folder: Path, repository: str) -> str:
    """Makes the repository if it is not there, and uploads a folder; the token is the one of `hf auth login`.

    Returns:
      The address of the commit.

    Raises:
      UserError: it did not work; the folder is as it was.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        full_name = api.create_repo(repository, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=full_name, folder_path=str(folder), commit_message="Model exported by latentjax"
        )
    except Exception as error:  # of the hub, the files, or the network, by a library that depends on the hub's version
        raise UserError(
            f"{folder} is whole, but was not uploaded to {repository}: {brief(error, 300)} (log in with `hf auth "
            "login`, or upload the folder with `hf upload`)"
        ) from error
    return str(commit.commit_url)
