"""The decoding step of `blocks`, with a reference version of attention in place of its kernel."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx import nn
from mlx_lm.tuner.lora import LoRALinear
from spelled_out import attend_joined

from grpo_actors.policy import copies
from grpo_actors.policy.adapter import fused
from grpo_actors.policy.architectures import ARCHITECTURES
from grpo_actors.policy.decoding.blocks import Blocks, blocks_of
from grpo_actors.policy.decoding.window import Prompts
from grpo_actors.policy.device import memory_bytes

pytestmark = pytest.mark.gpu

PROMPTS = [[3, 1, 2, 1, 3, 2, 1, 1, 2], [2, 1, 3], [5]]
COLUMNS = 16


def filled_cache(model):
    prompts = Prompts(model, PROMPTS)
    free = COLUMNS - prompts.stacked.shape[4]
    return mx.pad(prompts.stacked, [(0, 0)] * 4 + [(0, free), (0, 0)])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((name, {}) for name, row in ARCHITECTURES.items() if row.plain_blocks),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 8}},
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_blocks_give_the_models_own_logits_step_by_step(kind, settings):
    model = random_policy(kind, **settings).model
    blocks = blocks_of(model)
    arrays, cache = blocks.arrays(model), filled_cache(model)
    texts = [list(prompt) for prompt in PROMPTS]
    for step in range(4):
        last, lengths = mx.array([text[-1] for text in texts]), mx.array([len(text) - 1 for text in texts])
        logits = blocks.logits(arrays, last, lengths, cache, attend_joined)
        for text, row in zip(texts, logits, strict=True):
            np.testing.assert_allclose(np.array(row), np.array(model(mx.array([text]))[0, -1]), atol=1e-4)
            text.append(step + 7)


def test_a_model_with_other_or_quantised_blocks_is_not_supported():
    assert blocks_of(random_policy("gemma3_text").model) is None
    assert blocks_of(random_policy("qwen3_moe").model) is None
    assert blocks_of(random_policy("llama", rope_traditional=True).model) is None
    packed = random_policy("llama", hidden_size=64)
    packed.quantize(4)
    assert blocks_of(packed.model) is None


def test_an_adapted_model_is_supported_once_its_adapter_is_fused(tiny_lora):
    assert blocks_of(tiny_lora.model) is None
    with fused(tiny_lora.model):
        assert isinstance(blocks_of(tiny_lora.model), Blocks)


@pytest.mark.parametrize("part", ["self_attn", "mlp"])
def test_a_model_of_which_one_linear_module_is_adapted_is_not_supported(part):
    for layer in (0, -1):
        model = random_policy("llama").model
        owner = getattr(model.layers[layer], part)
        plain = {name: module for name, module in owner.items() if type(module) is nn.Linear}
        assert plain
        for name, module in plain.items():
            owner[name] = LoRALinear.from_base(module)
            assert blocks_of(model) is None, (layer, part, name)
            owner[name] = module
        assert blocks_of(model) is not None


def test_a_model_whose_joined_weights_would_take_too_much_memory_is_not_supported(monkeypatch):
    model = random_policy("llama").model
    copied = sum(
        array.nbytes
        for layer in Blocks.arrays(model)["layers"]
        for name in ("queries_keys_values", "gate_up")
        for array in layer[name].values()
    )
    monkeypatch.setattr(copies, "MEMORY_PARTS", memory_bytes() / copied)
    assert blocks_of(model) is not None
    monkeypatch.setattr(copies, "MEMORY_PARTS", memory_bytes() / copied * 1.01)
    assert blocks_of(model) is None
