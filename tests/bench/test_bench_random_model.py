"""Model folders with random weights."""

import json

import pytest

from grpo_actors.bench.random_model import build, config_json, random_model, write_folder
from grpo_actors.config import Config
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import load_policy
from grpo_actors.policy.quantization import parameter_count

#: Small sizes that override an architecture's, so that writing and loading take no time.
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-30b-a3b-4bit", 30_532_122_624),
        ("qwen3.5-0.8b", 752_393_024),  # without its vision tower
        ("smollm2-135m", 134_515_008),
        ("llama-3.2-1b", 1_235_814_400),
    ],
)
def test_each_architecture_has_the_published_number_of_parameters(name, parameters):
    # The count uses shapes only: MLX computes nothing until a value is needed.
    assert parameter_count(build(config_json(name, "bfloat16"))) == parameters


def test_a_written_folder_loads_with_the_tiny_tokenizer_and_the_architectures_vocabulary(tmp_path):
    write_folder(tmp_path, {**config_json("smollm2-135m", "float32"), **SMALL})
    policy = load_policy(Config.model_validate({"model": {"model_name": str(tmp_path)}}).model, seed=0)
    # Embedding, also the head: 49152 · 32. Attention: q and o 32 · 32, k and v 32 · 16. MLP: 3 · 32 · 64. Norms: 3 · 32.
    assert parameter_count(policy.model) == 49152 * 32 + 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 3 * 32
    assert policy.decode(policy.chat.encode([{"role": "user", "content": "12"}])).startswith("<|user|>12")
    assert max(policy.tokenizer.get_vocab().values()) < 49152


def test_a_kept_folder_is_found_again(tmp_path):
    folder = tmp_path / "kept"
    write_folder(folder, config_json("smollm2-135m", "bfloat16") | SMALL)
    (folder / "config.json").write_text(json.dumps(config_json("smollm2-135m", "bfloat16")))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    with random_model("smollm2-135m", "auto", str(folder)) as found:
        assert found == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_with_other_content_is_left_unchanged(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(ModelError, match="--keep"), random_model("smollm2-135m", "auto", str(tmp_path)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
