"""What is checked before anything is sent to the hub, and what is sent."""

import socket

import pytest
from hub import RIGHT, local_hub

from grpo_actors.errors import RunError
from grpo_actors.hub import check_token, send


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


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes our token; yields its address and what it keeps."""
    monkeypatch.setenv("HF_TOKEN", RIGHT)
    with local_hub(private=["owner/private"]) as (address, repositories):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        yield address, repositories


@pytest.fixture
def model(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).write_bytes(b"new")
    return tmp_path / "model"


def test_a_token_that_the_hub_takes_passes(hub):
    check_token("owner/name", "--upload")


def test_a_folder_takes_the_place_of_former_weights_and_of_nothing_else(hub, model):
    address, repositories = hub
    repositories["owner/private"] = {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"old"}
    assert send(model, "owner/private", "--upload", public=False) == f"{address}/owner/private"
    assert repositories["owner/private"] == {
        "config.json": b"new",
        "model.safetensors": b"new",
        "LICENSE": b"old",
    }


def test_nothing_becomes_public_unless_the_user_says_so(hub, model):
    _, repositories = hub
    repositories["owner/public"] = {}
    refusal = "^--upload: owner/public is public; add --public, or choose another repository$"
    with pytest.raises(RunError, match=refusal):
        send(model, "owner/public", "--upload", public=False)
    assert repositories == {"owner/public": {}}
    send(model, "owner/public", "--upload", public=True)
    send(model, "owner/new", "--upload", public=False)
    assert (
        repositories["owner/public"].keys()
        == repositories["owner/new"].keys()
        == {"config.json", "model.safetensors"}
    )
    # Made public, and therefore refused without the option.
    send(model, "owner/other", "--upload", public=True)
    with pytest.raises(RunError, match="owner/other is public"):
        send(model, "owner/other", "--upload", public=False)


def test_a_hub_that_refuses_an_upload_is_one_line(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", RIGHT[::-1])
    with pytest.raises(RunError, match=r"^--upload: owner/name was not written \(.*\)$"):
        send(model, "owner/name", "--upload", public=False)
