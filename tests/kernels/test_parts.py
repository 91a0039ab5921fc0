"""Every part runs, for all kinds of models, weights and losses. On a CPU, with small arrays; there are no kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import config_json

from grpo_actors.config import ModelConfig, load_config
from grpo_actors.config.objective import PRESETS
from grpo_actors.kernels import part, parts
from grpo_actors.kernels.small_model import in_small, small_policy
from grpo_actors.kernels.stage import parts_of
from grpo_actors.policy.quantization import is_quantized

LEARNER = ("loss", "statistics", "head", "body", "embedding", "step", "update")
SAMPLER = ("sampling", "evaluation", "weights")


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    monkeypatch.setattr(parts, "PROMPT_TOKENS", 12)
    monkeypatch.setattr(parts, "TOKENS", 20)


@pytest.fixture
def work_of(tmp_path):
    """The work of a model of this architecture that has only its config.json."""

    def make(family="qwen2", architecture=None, **settings):
        content = config_json(family, num_hidden_layers=6, **(architecture or {}))
        (tmp_path / "config.json").write_text(json.dumps(content))
        (tmp_path / "model.safetensors").touch()
        given = {"model_name": str(tmp_path), "num_generations": 2, "eval_batch_size": 2, **settings}
        overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        return parts.Work(load_config("smoke_test.toml", overrides).config)

    return make


@pytest.mark.parametrize("part", LEARNER + SAMPLER)
@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3_text", "mamba"])
def test_every_part_runs_for_models_with_and_without_packed_rows(work_of, family, part):
    parts.PARTS[part](work_of(family, {"tie_word_embeddings": family == "gemma3_text"}))


def test_the_head_is_found_where_the_texts_settings_are_nested(work_of):
    parts.head(work_of("qwen3_5"))


@pytest.mark.parametrize("part", ["body", "embedding", "step", "sampling", "weights", "update"])
@pytest.mark.parametrize(
    "settings",
    [
        {"fine_tune_type": "lora", "lora_dropout": 0.1},
        {"fine_tune_type": "dora"},
        {"fine_tune_type": "lora", "base_bits": 4},
        {"quantize_for_rollouts": True, "optimizer": "muon", "gradient_checkpointing": True},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_every_part_runs_for_adapters_and_quantised_weights(work_of, settings, part):
    wide = {"hidden_size": 64, "head_dim": 16}  # one group of quantised weights
    parts.PARTS[part](work_of("qwen2", wide, **settings))


@pytest.mark.parametrize("part", ["loss", "statistics", "head", "update"])
@pytest.mark.parametrize(
    "settings",
    [
        *({"algorithm": name} for name in PRESETS),
        {"kl_coeff": 0.1, "entropy_coeff": 0.01, "top_entropy_share": 0.5, "temperature": 0.7},
    ],
    ids=lambda settings: str(settings.get("algorithm", "all terms")),
)
def test_every_part_runs_for_every_loss(work_of, settings, part):
    parts.PARTS[part](work_of(**settings))


@pytest.mark.parametrize("part", ["sampling", "weights"])
def test_a_model_that_samples_quantised_is_quantised(work_of, part):
    work = work_of("qwen2", {"hidden_size": 64, "head_dim": 16}, quantize_for_rollouts=True)
    parts.PARTS[part](work)
    assert is_quantized(work.policy.model)


def test_a_process_does_its_part_and_ends_well(work_of, monkeypatch):
    done = []
    monkeypatch.setitem(parts.PARTS, "loss", lambda work: done.append(work.config))
    config = work_of().config
    monkeypatch.setattr(sys, "argv", ["part", "loss", config.model_dump_json()])
    assert part.main() == 0
    assert done == [config]


def test_the_stage_and_the_parts_have_the_same_names(work_of):
    config = work_of().config
    assert sorted(parts_of(config)) == sorted(parts.PARTS)
    unscored = config.evaluator.model_copy(update={"eval_every_updates": 0})
    assert "evaluation" not in parts_of(config.model_copy(update={"evaluator": unscored}))


def test_the_learner_has_two_micro_batches_so_that_gradients_are_added(work_of):
    for packed in (True, False):
        first = work_of().batch(packed=packed)["mask"].shape[0]
        assert 0 < first < parts.GROUPS * parts.GENERATIONS


def test_a_small_model_keeps_heads_and_kinds_of_layers():
    large = config_json(
        "olmo3",
        num_hidden_layers=32,
        layer_types=["sliding_attention"] * 3 + ["full_attention"] + ["sliding_attention"] * 28,
        vocab_size=50_280,
        intermediate_size=11_008,
    )
    small = in_small(large)
    # The first layer of another kind is the fourth. 50,280 = 392 · 128 + 104.
    assert small["layer_types"] == large["layer_types"][:4]
    assert (small["num_hidden_layers"], small["intermediate_size"], small["vocab_size"]) == (4, 1152, 4200)
    same = large.keys() - {"layer_types", "num_hidden_layers", "intermediate_size", "vocab_size"}
    assert {key: small[key] for key in same} == {key: large[key] for key in same}


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        ({"num_hidden_layers": 1}, 1),
        ({"num_hidden_layers": 32}, 2),
        ({"num_hidden_layers": 32, "sliding_window_pattern": 6}, 6),
        ({"num_hidden_layers": 32, "full_attention_interval": 4}, 4),
        ({"num_hidden_layers": 32, "full_attention_interval": 12}, 8),  # more would take too long
        ({"num_hidden_layers": 3, "layer_types": ["a", "b", "c"]}, 3),
    ],
)
def test_a_small_model_has_a_layer_of_each_kind_if_they_are_not_too_many(architecture, layers):
    assert in_small(architecture)["num_hidden_layers"] == layers
    assert in_small({"text_config": architecture})["text_config"]["num_hidden_layers"] == layers


def test_what_is_small_already_stays():
    assert in_small({"vocab_size": 300, "intermediate_size": 64, "moe_intermediate_size": 1200}) == {
        "vocab_size": 300,
        "intermediate_size": 64,
        "moe_intermediate_size": 1152,
        "num_hidden_layers": 2,
    }


def test_a_model_stored_with_quantised_weights_is_quantised_in_small_too(work_of):
    stored = {"hidden_size": 64, "head_dim": 16, "quantization": {"group_size": 64, "bits": 4}}
    work = work_of("qwen2", stored, fine_tune_type="lora")
    policy = small_policy(work.config.model, seed=0)
    assert is_quantized(policy.model)
    assert policy.model.layers[0].self_attn.q_proj.linear.bits == 4


def test_an_adapter_of_certain_layers_is_one_of_all_layers_in_small():
    # The small model has 2 of the layers, and the arrays of the start have the sizes of the real one.
    names = ("model.layers.3.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "mlp.up_proj")
    config = ModelConfig(fine_tune_type="lora", lora_layers=4, lora_keys=names, adapter_path="gone")
    policy = small_policy(config, seed=0)
    assert len(policy.model.layers) == 2
    adapted = {name.removesuffix(".lora_a") for name in policy.trainable() if name.endswith(".lora_a")}
    assert adapted == {
        f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }


def test_a_part_is_a_process_whose_last_line_says_why_it_failed(work_of):
    config = work_of().config
    (Path(config.model.model_name) / "config.json").write_text('{"model_type": "unheard_of"}')
    command = [sys.executable, "-m", "grpo_actors.kernels.part", "head", config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode
    assert done.stderr.splitlines()[-1] == "ValueError: Model type unheard_of not supported."
