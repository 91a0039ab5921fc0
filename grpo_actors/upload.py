"""A finished model folder to the Hugging Face hub. Knows files and a repository, nothing of models."""

import re
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError

from grpo_actors.errors import ModelError, first_line

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: The hub says no, or cannot be reached. The base is the HTTP library's root error: of httpx, or of what has
#: taken its place in the hub's client.
_REFUSALS = (cast("type[Exception]", HfHubHTTPError.__bases__[0]), OSError, ValueError)


def check_upload(repository: str) -> None:
    """Before the work: a repository's name, a token, and a hub that knows it.

    Raises:
        ModelError: one of them is missing.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ModelError(f"--upload-repo: must be owner/name, got {repository!r}")
    if get_token() is None:
        raise ModelError(
            "--upload-repo: there is no token; set HF_TOKEN or run hf auth login, or leave it out"
        )
    try:
        HfApi().whoami()
    except _REFUSALS as error:
        raise ModelError(
            f"--upload-repo: the hub does not take the token, or is not reached ({first_line(error)}); "
            "nothing was converted"
        ) from error


def upload(folder: Path, repository: str, base_model: str | None) -> str:
    """Send all of `folder`, with a card that names the base model if that has a hub id; returns the address.

    Raises:
        ModelError: the hub refused; `folder` is whole and stays.
    """
    data = ModelCardData(
        library_name="mlx", pipeline_tag="text-generation", tags=["mlx"], base_model=base_model
    )
    origin = f"Converted to MLX from {base_model}." if base_model else "Converted to MLX."
    api = HfApi()
    try:
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {repository}\n\n{origin}\n").save(folder / "README.md")
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except _REFUSALS as error:
        raise ModelError(
            f"--upload-repo: {folder} is whole, but did not reach {repository} ({first_line(error)}); "
            f"send it with hf upload {repository} {folder}"
        ) from error
    return f"{api.endpoint}/{repository}"
