"""Small random models of other families: a batch samples the same as single prompts, with the learner's log-probs."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx.utils import tree_flatten

from grpo_actors.errors import ConfigError
from grpo_actors.policy.architectures import ARCHITECTURES, Architecture, architecture_of
from grpo_actors.policy.decoding.findings import findings
from grpo_actors.policy.decoding.fixed_batch import _decodes_ragged_rows
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.logprobs import completion_logprobs, split_head
from grpo_actors.policy.model import prepare_training

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 4], [9, 9, 8, 7, 6, 5, 4], [3]]
SEEDS = [[10, 11], [20], [30, 31], [40]]

#: Full attention, a sliding window, convolution, state spaces (one respects padding, one does not), experts.
FAMILIES = [
    *("qwen2", "qwen3", "gemma3_text", "lfm2", "mamba", "mamba2", "qwen3_moe", "qwen3_next", "stablelm"),
    "nanochat",
]


def assert_batch_is_single(policy, prompts=PROMPTS, seeds=SEEDS, new_tokens=20):
    params = SamplingParams(new_tokens)
    together = sample_groups(policy, prompts, seeds, params)
    for prompt, group, samples in zip(prompts, seeds, together, strict=True):
        for seed, sample in zip(group, samples, strict=True):
            [[alone]] = sample_groups(policy, [prompt], [[seed]], params)
            assert alone.tokens == sample.tokens
            np.testing.assert_allclose(sample.logprobs, alone.logprobs, atol=1e-4)
            learner, _ = completion_logprobs(
                policy.model,
                mx.array([[*prompt, *sample.tokens, 0]]),
                mx.array([len(prompt) - 1]),
                mx.array([sample.tokens]),
                1.0,
            )
            np.testing.assert_allclose(sample.logprobs, np.array(learner)[0], atol=5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_ragged_batch_samples_the_same_as_each_prompt_alone(family):
    assert_batch_is_single(random_policy(family))


@pytest.mark.parametrize("window", [2, 4, 16])
def test_sliding_windows_shorter_and_longer_than_the_prompts_are_respected(window):
    assert_batch_is_single(random_policy("gemma3_text", sliding_window=window))


def test_two_short_prompts_fit_a_rotating_cache():
    # The cache would take a single column of padding for a decoding step.
    assert_batch_is_single(random_policy("gemma3_text"), [[1, 2], [3]], [[1], [2]])


def test_a_model_that_treats_padding_as_text_is_detected():
    mamba, mamba2 = random_policy("mamba"), random_policy("mamba2")
    for policy in (mamba, mamba2):
        sample_groups(policy, PROMPTS, SEEDS, SamplingParams(1))
    assert findings(mamba).respects_padding is False
    assert findings(mamba2).respects_padding is True


def test_a_part_that_is_zero_at_the_start_hides_no_fault_of_a_ragged_batch():
    # Its convolution takes its state from the last column, which is padding in a shorter prompt.
    model = random_policy("baichuan_m1").model
    before = dict(tree_flatten(model.parameters()))
    assert not mx.any(before["model.layers.0.self_attn.conv_k"])
    assert not _decodes_ragged_rows(model)
    after = dict(tree_flatten(model.parameters()))
    assert all(mx.array_equal(after[name], array) for name, array in before.items())


def test_weights_that_mlx_lm_changes_at_loading_cannot_be_trained():
    # Its head's rows are scaled to length 1.
    policy = random_policy("baichuan_m1")
    with pytest.raises(
        ConfigError, match=r'^model\.fine_tune_type: must be "lora".* mlx-lm changes lm_head\.weight'
    ):
        prepare_training(policy, seed=0)
    prepare_training(random_policy("qwen3_next"), seed=0)


def test_a_quantised_model_samples_the_same_in_a_batch_and_alone():
    policy = random_policy("qwen2", hidden_size=64, num_attention_heads=8)
    policy.quantize(4)
    assert_batch_is_single(policy)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(name for name, row in ARCHITECTURES.items() if row.plain_head))
def test_a_plain_head_on_its_body_gives_the_models_logits(family, tied):
    model = random_policy(family, tie_word_embeddings=tied).model
    split = split_head(model)
    assert split is not None
    body, head = split
    tokens = mx.array(PROMPTS[:1])
    assert mx.array_equal(head(body(tokens)), model(tokens))


def test_a_row_is_found_by_the_module_of_a_model_and_of_its_parts():
    assert architecture_of(random_policy("llama").model) is ARCHITECTURES["llama"]
    # SmolLM3's layers use Llama's MLP.
    smollm3 = random_policy("smollm3").model
    assert not architecture_of(smollm3).gated_mlp
    assert architecture_of(smollm3.layers[0].mlp).gated_mlp
    assert not architecture_of(random_policy("stablelm").model).plain_head


def test_the_most_common_models_have_all_fast_paths():
    fast = {name for name, row in ARCHITECTURES.items() if row == Architecture(True, True, True)}
    assert fast >= {"llama", "qwen2", "qwen3"}


def test_a_model_whose_head_is_not_plain_is_not_split():
    policy = random_policy("stablelm")
    assert split_head(policy.model) is None
