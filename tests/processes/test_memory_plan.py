"""The memory plan counts what can be counted, from files alone."""

from grpo_actors.config import load_config
from grpo_actors.policy.locate import EMBEDDED
from grpo_actors.processes.memory_plan import count_parameters, memory_plan


def test_the_embedded_models_parameters_are_counted_from_its_header():
    # Embedding 320·128; four layers of 4·128² attention, 3·128·256 MLP, 2·128 norms; one last norm.
    assert count_parameters(EMBEDDED) == 320 * 128 + 4 * (4 * 128**2 + 3 * 128 * 256 + 2 * 128) + 128


def test_full_fine_tuning_in_float32_holds_sixteen_bytes_a_parameter():
    config = load_config(None, ["model_name=tiny", "dtype=float32", "task=arithmetic", "workers=1"]).config
    lines = memory_plan(config).splitlines()
    assert lines[0] == "0.7 M parameters of 4 bytes"
    # Weights, gradient and two means, 4 bytes each: 16 · 697,472 = 11.2 MB.
    assert lines[1] == "learner    0.01 GB and activations"
    # 2 · 4 layers · 128 numbers of 4 bytes, (512 + 256) tokens, 8 completions: 25.2 MB beside 2.8 MB of weights.
    assert lines[2] == "rollout-0  0.03 GB, of it 0.03 GB KV cache at most"


def test_a_model_on_the_hub_has_no_plan_yet():
    assert "on the hub" in memory_plan(load_config(None, ["model_name=owner/name"]).config)
