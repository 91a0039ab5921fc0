"""The Hugging Face hub as a place to send a finished folder to. Knows a folder and a name, nothing of models."""

import re
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from grpo_actors.errors import RunError, first_line

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: The hub says no, or cannot be reached. The base is the root of the errors of the hub's HTTP client, whichever that is.
_REFUSALS = (cast("type[Exception]", HfHubHTTPError.__bases__[0]), OSError, ValueError)


def check_token(repository: str, option: str) -> None:
    """Before any work: a name that can be one, a token, and a hub that takes it.

    Raises:
        RunError: says which is missing, by the `option` that asked for it.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise RunError(f"{option}: must be owner/name, got {repository!r}")
    if get_token() is None:
        raise RunError(
            f"{option}: there is no token of the hub; set HF_TOKEN, run hf auth login, or leave it out"
        )
    try:
        HfApi().whoami()
    except _REFUSALS as error:
        raise RunError(
            f"{option}: the hub does not take the token, or is not reached ({first_line(error)}); nothing was made"
        ) from error


def send(folder: Path, repository: str, option: str) -> str:
    """Send all files of `folder` in one commit, so that all arrive or none; returns the address.

    Raises:
        RunError: the hub refused.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        # Weights that were there go in the same commit: whoever loads the folder takes all files of that kind.
        api.upload_folder(folder_path=folder, repo_id=repository, delete_patterns=_WEIGHTS)
    except _REFUSALS as error:
        raise RunError(f"{option}: {repository} was not written ({first_line(error)})") from error
    return f"{api.endpoint}/{repository}"
