"""Checks before anything is sent to the hub."""

import socket

import pytest

from grpo_actors.errors import RunError
from grpo_actors.hub import check_token


@pytest.fixture(autouse=True)
def no_token(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))


@pytest.mark.parametrize("name", ["model", "a/b/c", "/b", "a/", "a b/c", ""])
def test_a_repository_is_an_owner_and_a_name(name):
    with pytest.raises(RunError, match="--upload: must be owner/name, got "):
        check_token(name, "--upload")


def test_without_a_token_nothing_is_begun():
    with pytest.raises(RunError, match="--upload: there is no token of the hub"):
        check_token("owner/name", "--upload")


def test_a_hub_that_is_not_reached_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_any")
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}"
        )
    with pytest.raises(RunError, match=r"^--upload: .* is not reached \(.*\); nothing was made$"):
        check_token("owner/name", "--upload")
