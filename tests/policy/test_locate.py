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
