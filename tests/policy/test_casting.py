"""The types of a model's floats: which are cast, and what its config.json says of them."""

import json
import shutil

import mlx.core as mx
import mlx_lm.utils
import pytest
from architectures import config_json
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3_5
from written import write_checkpoint

from grpo_actors.config import Config, ModelConfig
from grpo_actors.policy.config_dtype import stored_dtype, with_dtype
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.training import Training

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@pytest.fixture
def nested(tmp_path):
    """A folder of a Qwen 3.5 that states its dtype in text_config only; its A_log has values that bfloat16 has not."""
    vocabulary = json.loads((EMBEDDED / "config.json").read_text())["vocab_size"]
    config = config_json("qwen3_5", vocabulary=vocabulary)
    config["text_config"]["dtype"] = "bfloat16"
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(config))
    model.language_model.model.layers[0].linear_attn.A_log = mx.array([0.1, 1.001, 2.3, 0.7])
    folder = tmp_path / "model"
    folder.mkdir()
    mlx_lm.utils.save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config))
    for path in EMBEDDED.iterdir():
        if path.name in TOKENIZER:
            shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_what_a_model_keeps_exact_is_never_rounded_and_all_else_has_the_type_asked_for(nested, dtype):
    policy = load_policy(ModelConfig(model_name=str(nested), dtype=dtype), seed=0)
    arrays = dict(tree_flatten(policy.model.parameters()))
    exact = {name: array for name, array in arrays.items() if array.dtype == mx.float32}
    if dtype != "float32":
        assert list(exact) == ["language_model.model.layers.0.linear_attn.A_log"]
    assert exact["language_model.model.layers.0.linear_attn.A_log"][1].item() == pytest.approx(
        1.001, abs=1e-6
    )
    assert {str(a.dtype) for a in arrays.values()} <= {f"mlx.core.{dtype}", "mlx.core.float32"}


def test_a_checkpoint_states_its_type_where_the_source_did(nested, run_dir):
    policy = load_policy(ModelConfig(model_name=str(nested), dtype="float16"), seed=0)
    training = Training(policy.model, Config().learner, lambda *_: None)
    folder = write_checkpoint(run_dir, 1, policy, training, {}).path
    written = json.loads((folder / "config.json").read_text())
    assert written["text_config"]["dtype"] == "float16"
    assert "dtype" not in written
    again = load_policy(ModelConfig(model_name=str(folder), dtype="float16"), seed=0)
    assert all(
        mx.array_equal(array, dict(tree_flatten(policy.model.parameters()))[name])
        for name, array in tree_flatten(again.model.parameters())
    )


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "text_config": {"dtype": "bfloat16"}}, "float16"),
        ({"dtype": None, "text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"text_config": None}, None),
    ],
)
def test_the_stored_type_is_found_at_the_top_or_in_the_text_part(architecture, dtype):
    assert stored_dtype(architecture) == dtype


def test_every_part_gets_the_new_type_but_the_packing_of_weights():
    architecture = {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "rope": {"theta": 1.0}},
        "audio_config": {"torch_dtype": "float32"},
        "quantization_config": {"dtype": "int4"},
    }
    changed = with_dtype(architecture, "float16")
    assert changed == {
        "dtype": "float16",
        "text_config": {"dtype": "float16", "rope": {"theta": 1.0}},
        "audio_config": {"torch_dtype": "float16"},
        "quantization_config": {"dtype": "int4"},
    }
    assert architecture["text_config"]["dtype"] == "bfloat16", "the source's config is not changed"
