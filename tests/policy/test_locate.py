"""Which model a name stands for: a folder, or a model of the hub."""

import pytest
from huggingface_hub import constants

from grpo_actors.errors import ModelError
from grpo_actors.policy.locate import locate


def test_a_name_in_a_folder_that_exists_is_a_missing_folder_and_the_hub_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    assert locate("outputs/model") == "outputs/model"  # nothing here has this name
    (tmp_path / "outputs").mkdir()
    with pytest.raises(ModelError, match=r"^model\.model_name: no folder model in outputs/; if the hub's"):
        locate("outputs/model")
    # A folder that is named like an owner on the hub hides no model that was downloaded.
    (cache / "models--outputs--model").mkdir(parents=True)
    assert locate("outputs/model") == "outputs/model"


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ((), "is no model folder (config.json not found)"),
        (("config.json",), "holds no weights (model*.safetensors not found)"),
        (("config.json", "pytorch_model.bin"), "holds its weights in PyTorch's .bin files"),
    ],
)
def test_a_folder_without_a_model_is_refused_with_what_it_lacks(tmp_path, files, why):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ModelError) as refused:
        locate(str(tmp_path), "--model")
    assert str(refused.value).startswith(f"--model: {tmp_path} {why}")
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        (tmp_path / name).touch()
    assert locate(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./owner/name", "/owner", "~/name", "name", "a/b/c", "../name"])
def test_a_name_that_looks_like_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"no folder .*, and '.*' is no hub id \(owner/name\)"):
        locate(name)
