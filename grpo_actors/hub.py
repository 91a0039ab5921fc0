"""The Hugging Face hub as a place to send a finished folder to. Knows a folder and a name, nothing of models."""

import re
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from grpo_actors.errors import RunError

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: What the hub, or the way there, says no with. Its first base is the error of the HTTP client that it uses.
_REFUSALS = (cast("type[Exception]", HfHubHTTPError.__mro__[1]), OSError, ValueError)


def check_token(repository: str) -> None:
    """Before any work: a name that can be one, a token, and a hub that takes it.

    Raises:
        RunError: says which is missing.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise RunError(f"--upload: must be OWNER/NAME, got {repository}")
    if get_token() is None:
        raise RunError("--upload: there is no token of the hub; set HF_TOKEN, or run: hf auth login")
    try:
        HfApi().whoami()
    except _REFUSALS as error:
        raise RunError(
            f"--upload: the hub did not take the token, or could not be reached: {_first_line(error)}"
        ) from error


def send(folder: Path, repository: str) -> str:
    """Send all files of `folder` in one commit, so that all arrive or none; returns the address.

    Raises:
        RunError: the hub refused.
    """
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except _REFUSALS as error:
        raise RunError(f"--upload: {repository} was not written: {_first_line(error)}") from error
    return f"{api.endpoint}/{repository}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
