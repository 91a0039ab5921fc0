"""Upload a finished folder to the Hugging Face hub. Does not depend on models."""

import re
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from grpo_actors.errors import RunError, first_line

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: Errors if the hub rejects a request or cannot be reached. The first is the root of its HTTP client's errors, whichever
#: client that is.
_HUB_ERRORS = (cast("type[Exception]", HfHubHTTPError.__bases__[0]), OSError, ValueError)


def check_token(repository: str, option: str) -> None:
    """Check, before any work, that the repository name is valid and that the hub accepts the token.

    Raises:
        RunError: one of them fails; the text begins with `option`.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise RunError(f"{option}: must be owner/name, got {repository!r}")
    if get_token() is None:
        raise RunError(
            f"{option}: there is no token of the hub; set HF_TOKEN, run hf auth login, or leave it out"
        )
    try:
        HfApi().whoami()
    except _HUB_ERRORS as error:
        raise RunError(
            f"{option}: the hub does not take the token, or is not reached ({first_line(error)}); nothing was made"
        ) from error


def send(folder: Path, repository: str, option: str, *, public: bool) -> str:
    """Upload all files of `folder` in one commit, so that all arrive or none; return the address.

    Args:
        folder: The folder.
        repository: Its name on the hub, owner/name; made if it does not exist.
        option: The command line's option that named it.
        public: Whether everybody may see it. Otherwise a new repository is private, and a public one is refused.

    Raises:
        RunError: the hub rejected it or could not be reached, or the repository is public.
    """
    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        if not public and not api.repo_info(repository).private:
            raise RunError(f"{option}: {repository} is public; add --public, or choose another repository")
        # Delete former weights in the same commit: a loader reads every weight file in the folder.
        api.upload_folder(folder_path=folder, repo_id=repository, delete_patterns=_WEIGHTS)
    except _HUB_ERRORS as error:
        raise RunError(f"{option}: {repository} was not written ({first_line(error)})") from error
    return f"{api.endpoint}/{repository}"
