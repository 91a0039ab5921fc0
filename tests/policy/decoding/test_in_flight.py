"""New weights in the middle of completions: which weights sample each token, and from which keys and values."""

import mlx.core as mx
import numpy as np
import pytest
from architectures import random_policy
from mlx_lm.models.cache import make_prompt_cache

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError
from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.draw import draw, draws
from grpo_actors.policy.decoding.sampling import SamplingParams, sample_groups
from grpo_actors.policy.decoding.step import require_fit
from grpo_actors.policy.model import load_policy

pytestmark = pytest.mark.gpu

PROMPTS = [[2, 21, 22, 15, 23, 24, 1, 3], [2, 21, 9, 3]]
#: No completion of these seeds ends earlier.
PARAMS = SamplingParams(12)
KINDS = {
    "full": {},
    "lora": {"fine_tune_type": "lora", "lora_rank": 4},
    "dora": {"fine_tune_type": "dora", "lora_rank": 4},
    "qlora": {"fine_tune_type": "lora", "lora_rank": 4, "base_bits": 4},
    "qdora": {"fine_tune_type": "dora", "lora_rank": 4, "base_bits": 4},
    "quantised workers": {},
}


def policy_of(kind):
    policy = load_policy(ModelConfig(dtype="float32", **KINDS[kind]), seed=0)
    policy.stop_tokens = frozenset()
    if kind == "quantised workers":
        policy.quantize(4)
    return policy


def other_weights(kind, seed):
    """Return weights as the learner would send them, different enough to change tokens."""
    arrays = load_policy(ModelConfig(dtype="float32", **KINDS[kind]), seed=0).trainable()
    keys = mx.random.split(mx.random.key(seed), len(arrays))
    return {
        name: array + 0.03 * mx.random.normal(array.shape, key=key)
        for (name, array), key in zip(sorted(arrays.items()), keys, strict=True)
    }


def by_hand(kind, prompt, seed, changes):
    """Sample token by token with mlx-lm's cache; `changes` maps a token's index to the weights loaded before it."""
    policy, uniforms = policy_of(kind), mx.array(draws(seed, PARAMS.max_new_tokens))
    cache = make_prompt_cache(policy.model)
    if len(prompt) > 1 and 0 not in changes:
        policy.model(mx.array([prompt[:-1]]), cache=cache)
    tokens, logprobs, fed = [], [], prompt[-1]
    for i in range(PARAMS.max_new_tokens):
        if i in changes:
            policy.load_trainable(changes[i])
            if i == 0:
                policy.model(mx.array([prompt[:-1]]), cache=cache)
        logits = policy.model(mx.array([[fed]]), cache=cache)[:, -1]
        token, logprob = draw(logits, uniforms[i : i + 1], PARAMS)
        fed = token.item()
        tokens.append(fed)
        logprobs.append(logprob.item())
    return tokens, logprobs


def sampled(sampler, changes):
    """Step until idle, and close; `changes` maps a number of steps to the weights adopted after them, numbered from 1."""
    done, steps = {}, 0
    while not sampler.idle:
        if steps in changes:
            sampler.adopt(1 + sorted(changes).index(steps), changes[steps])
        done.update(sampler.step()[1])
        steps += 1
    sampler.close()
    return done


def assert_is(sample, tokens, logprobs):
    assert sample.tokens == tokens
    np.testing.assert_allclose(sample.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_is_sampled_by_its_version_from_the_keys_and_values_of_earlier_versions(kind):
    first, second = other_weights(kind, 1), other_weights(kind, 2)
    sampler = Sampler(policy_of(kind), PARAMS, max_rows=3, version=0)
    sampler.submit(0, PROMPTS[0], [1, 2])
    sampler.submit(1, PROMPTS[1], [3])
    # A call of `step` starts one token of each row: the fifth was under way, unread, at the first change.
    done = sampled(sampler, {5: first, 8: second})
    for key, seeds in ((0, [1, 2]), (1, [3])):
        for seed, sample in zip(seeds, done[key], strict=True):
            assert_is(sample, *by_hand(kind, PROMPTS[key], seed, {5: first, 8: second}))
            assert sample.versions == [0] * 5 + [1] * 3 + [2] * 4
            # The change has an effect.
            _, unchanged = by_hand(kind, PROMPTS[key], seed, {})
            np.testing.assert_allclose(sample.logprobs[:5], unchanged[:5], atol=1e-4)
            assert not np.allclose(sample.logprobs[5:], unchanged[5:], atol=1e-3)


def test_a_completion_that_begins_after_the_change_does_not_depend_on_the_old_weights():
    new = other_weights("full", 1)
    sampler = Sampler(policy_of("full"), PARAMS, max_rows=1, version=0)
    sampler.submit(0, PROMPTS[0], [1, 2])  # the second one waits for the first one's row
    [[before, after]] = sampled(sampler, {3: new}).values()
    assert before.versions == [0] * 3 + [1] * 9
    assert after.versions == [1] * 12
    assert_is(after, *by_hand("full", PROMPTS[0], 2, {0: new}))


@pytest.mark.parametrize("kind", ["lora", "qdora"])
def test_close_restores_the_policy_with_its_adapter_and_the_newest_weights(kind):
    policy, new = policy_of(kind), other_weights(kind, 1)
    sampler = Sampler(policy, PARAMS, max_rows=2, version=0)
    sampler.adopt(1, new)
    sampler.close()
    sampler.close()
    assert policy.trainable().keys() == new.keys()
    assert all(mx.array_equal(array, new[name]) for name, array in policy.trainable().items())
    [[sample]] = sample_groups(policy, PROMPTS[:1], [[1]], PARAMS)
    assert_is(sample, *by_hand(kind, PROMPTS[0], 1, {0: new}))


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_dropping_a_group_under_way_or_waiting_does_not_change_the_others(dropped):
    sampler = Sampler(policy_of("full"), PARAMS, max_rows=3, version=0)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    for key, prompt in enumerate(prompts):  # the last one waits
        sampler.submit(key, prompt, [2 * key, 2 * key + 1])
    for _ in range(4):
        sampler.step()
    sampler.drop(dropped)
    done = sampled(sampler, {})
    assert done.keys() == {0, 1, 2} - {dropped}
    for key, samples in done.items():
        for seed, sample in zip([2 * key, 2 * key + 1], samples, strict=True):
            assert_is(sample, *by_hand("full", prompts[key], seed, {}))


def test_a_sampler_whose_last_group_was_dropped_accepts_the_next_one():
    sampler = Sampler(policy_of("full"), PARAMS, max_rows=2, version=0)
    sampler.submit(7, PROMPTS[0], [1, 2])
    sampler.step()
    sampler.drop(7)
    sampler.submit(7, PROMPTS[1], [3])  # the same lease, granted again
    [[sample]] = sampled(sampler, {}).values()
    assert_is(sample, *by_hand("full", PROMPTS[1], 3, {}))


def test_a_model_whose_rows_must_begin_together_is_refused_with_the_setting():
    with pytest.raises(ConfigError, match=r"^rollout\.in_flight_updates: must be false for "):
        require_fit(random_policy("mamba"), "rollout.in_flight_updates: must be false")
