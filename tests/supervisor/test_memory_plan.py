"""Test the memory plan, which is computed from the model's files only."""

import mlx_lm.utils
import pytest

from grpo_actors.config import load_config
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.supervisor.memory_plan import memory_plan, plan_of

# Embedding 320·128; four layers of 4·128² attention, 3·128·256 MLP, 2·128 norms; one last norm.
MATRICES_IN_LAYERS = 4 * (4 * 128**2 + 3 * 128 * 256)
NORMS = 4 * 2 * 128 + 128
PARAMETERS = 320 * 128 + MATRICES_IN_LAYERS + NORMS


def plan(*overrides, folder=EMBEDDED):
    return plan_of(folder, load_config(None, ["task=arithmetic", "dtype=float32", *overrides]).config)


def test_the_embedded_models_parameters_are_counted_from_its_header():
    assert plan().parameters == PARAMETERS


def test_projections_that_one_product_can_replace_are_counted_too():
    # Four layers' q, k and v of 128 × 128, gate and up of 256 × 128, in bfloat16.
    assert plan("dtype=bfloat16").joined == 4 * (3 * 128 + 2 * 256) * 128 * 2


def test_full_fine_tuning_in_float32_holds_sixteen_bytes_a_parameter():
    config = load_config(None, ["model_name=tiny", "dtype=float32", "task=arithmetic", "workers=1"]).config
    lines = memory_plan(config).splitlines()
    assert lines[0] == "0.7 M parameters, floats of 4 bytes"
    # Weights, gradient and two means, 4 bytes each: 16 · 697,472 = 11.2 MB.
    assert lines[1] == "learner    0.01 GB and activations"
    # 2 · 4 layers · 128 numbers of 4 bytes, (512 + 256) tokens, 8 completions: 25.2 MB, and 2.8 MB of weights.
    assert lines[2] == "rollout-0  0.03 GB, of it 0.03 GB KV cache at most"


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ("adam", 8 * PARAMETERS),
        ("lion", 4 * PARAMETERS),
        ("adafactor", 0),
        ("muon", 4 * MATRICES_IN_LAYERS + 8 * (PARAMETERS - MATRICES_IN_LAYERS)),
    ],
)
def test_an_optimizer_holds_its_means(optimizer, state):
    held = plan(f"optimizer={optimizer}", "kl_coeff=0")
    assert held.learner == 8 * PARAMETERS + state  # weights and gradient
    half = plan(f"optimizer={optimizer}", "kl_coeff=0.1", "dtype=bfloat16")
    assert half.learner == (2 + 4 + 4 + 2) * PARAMETERS + state  # also float32 weights and the reference


def test_a_quantised_base_and_its_adapter_are_small_in_every_process():
    # 4 bits, and for each 64 weights a scale and an offset of 4 bytes: 5 bits a weight. The norms stay.
    base = (PARAMETERS - NORMS) * 5 / 8 + 4 * NORMS
    # Rank 2: rows + columns, twice. Of 4 · (4 of 128 × 128 and 3 of 128 × 256); 16 bytes each with AdamW.
    adapter = 2 * 4 * (4 * 256 + 3 * 384)
    settings = ("fine_tune_type=lora", "base_bits=4", "lora_rank=2", "kl_coeff=0")
    held = plan(*settings)
    assert (held.learner, held.worker, held.evaluator) == (base + 16 * adapter, base, base)
    last = plan(*settings, "lora_layers=1", 'lora_keys=["self_attn.q_proj"]')
    assert last.learner == base + 16 * 2 * 256


def test_only_workers_quantise_for_rollouts():
    held = plan("quantize_for_rollouts=true", "rollout_bits=8")
    assert held.worker == (PARAMETERS - NORMS) * 9 / 8 + 4 * NORMS  # 8 bits and 64 for 64 weights
    assert held.evaluator == 4 * PARAMETERS


def test_a_folder_that_is_quantised_already_counts_as_unpacked(tmp_path):
    model, tokenizer, config = mlx_lm.utils.load(str(EMBEDDED), return_config=True)
    model, config = mlx_lm.utils.quantize_model(model, config, group_size=64, bits=4)
    mlx_lm.utils.save(tmp_path / "small", str(EMBEDDED), model, tokenizer, config)
    small = plan("fine_tune_type=lora", folder=tmp_path / "small")
    assert small.parameters == PARAMETERS
    assert small.evaluator == (PARAMETERS - NORMS) * 5 / 8 + 4 * NORMS


def test_a_model_on_the_hub_has_no_plan_yet():
    assert "on the hub" in memory_plan(load_config(None, ["model_name=owner/name"]).config)


@pytest.mark.parametrize(("bound", "completions"), [(0, 16), (5 * 768 + 700, 5), (10, 1)])
def test_a_limit_on_cached_tokens_limits_the_cache(bound, completions):
    # 2 · 4 layers · 128 numbers of 4 bytes for each of 512 + 256 tokens of a completion; 2 groups of 8 without a bound.
    held = plan("batch_groups=2", f"max_kv_tokens={bound}")
    assert held.cache == completions * 768 * 2 * 4 * 128 * 4
