"""Continuous batching: a completion does not depend on which others share the batch, nor on when it gets a row."""

import functools

import numpy as np
import pytest
from architectures import random_policy

from grpo_actors.config import ModelConfig
from grpo_actors.policy.decoding import window
from grpo_actors.policy.decoding.batching import Sampler
from grpo_actors.policy.decoding.sampling import SamplingParams, rows_for, sample_groups
from grpo_actors.policy.model import load_policy

QUESTIONS = ["What is 12 + 34?", "7", "Tom has 21 apples and buys 3 bags of 14 apples. How many has he now?"]
SEEDS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


@pytest.fixture
def prompts(tiny):
    return [tiny.chat.encode([{"role": "user", "content": text}]) for text in QUESTIONS]


@functools.cache
def policy_alone():
    return load_policy(ModelConfig(dtype="float32"), seed=0)


@functools.cache
def alone(prompt, seed, params):
    """Return the completion of the embedded model that shares its batch with no other; `prompt`: a tuple."""
    [[sample]] = sample_groups(policy_alone(), [prompt], [[seed]], params)
    return sample


def assert_as_alone(prompts, groups, params):
    for prompt, seeds, samples in zip(prompts, SEEDS, groups, strict=True):
        for seed, sample in zip(seeds, samples, strict=True):
            expected = alone(tuple(prompt), seed, params)
            assert sample.tokens == expected.tokens
            assert sample.finished == expected.finished
            np.testing.assert_allclose(sample.logprobs, expected.logprobs, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("max_rows", [1, 2, 3, 7, 10, 50])
def test_any_number_of_rows_gives_every_completion_the_tokens_it_has_alone(tiny, prompts, max_rows):
    params = SamplingParams(30)
    sampler = Sampler(tiny, params, max_rows)
    for i, prompt in enumerate(prompts):
        sampler.submit(i, prompt, SEEDS[i])
    done, most = {}, 0
    while not sampler.idle:
        tokens, groups = sampler.step()
        most = max(most, tokens)
        done.update(groups)
    assert most == min(max_rows, 10)
    assert_as_alone(prompts, [done[i] for i in range(3)], params)


@pytest.mark.parametrize("growth", [2, 16, 256])
def test_adding_and_dropping_columns_changes_no_completion(tiny, prompts, growth, monkeypatch):
    monkeypatch.setattr(window, "GROWTH", growth)
    params = SamplingParams(30, repetition_penalty=1.2)
    sampler = Sampler(tiny, params, max_rows=2)
    # The longest prompt comes last: it needs more columns before the next than there are.
    for i in (1, 0, 2):
        sampler.submit(i, prompts[i], SEEDS[i])
    done = {}
    while not sampler.idle:
        done.update(sampler.step()[1])
    assert_as_alone(prompts, [done[i] for i in range(3)], params)


def test_a_group_may_be_submitted_while_others_are_under_way(tiny, prompts):
    params = SamplingParams(30)
    sampler, done, steps = Sampler(tiny, params, max_rows=6), {}, 0
    sampler.submit(0, prompts[0], SEEDS[0])
    while not sampler.idle or len(done) < 3:
        if steps in (3, 40):  # one next to others, one when the batch has shrunk or is empty
            i = 1 if steps == 3 else 2
            sampler.submit(i, prompts[i], SEEDS[i])
        done.update(sampler.step()[1])
        steps += 1
    assert_as_alone(prompts, [done[i] for i in range(3)], params)


@pytest.mark.gpu
def test_a_free_row_is_used_again_at_the_next_step(tiny, prompts):
    # 10 completions of at most 30 tokens on 2 rows: waiting for the slower one of each pair would take longer.
    params = SamplingParams(30)
    sampler = Sampler(tiny, params, max_rows=2)
    for i, prompt in enumerate(prompts):
        sampler.submit(i, prompt, SEEDS[i])
    counts, lengths = [], []
    while not sampler.idle:
        tokens, groups = sampler.step()
        counts.append(tokens)
        lengths += [len(sample.tokens) for _, samples in groups for sample in samples]
    # The end of a completion is seen one step late, so its row is empty for one step.
    assert sum(counts) == sum(lengths)
    assert len(counts) <= (sum(lengths) + len(lengths) * 1 + 30) / 2 + 1


def test_prompts_of_one_token_have_nothing_to_prefill(tiny):
    params = SamplingParams(6)
    groups = sample_groups(tiny, [[5], [7]], [[1], [2]], params)
    assert all(len(sample.tokens) == 6 or sample.finished for [sample] in groups)
    assert groups[0][0].tokens == alone((5,), 1, params).tokens


def test_the_bound_on_cached_tokens_bounds_the_rows(tiny, prompts):
    longest = max(len(prompt) for prompt in prompts)
    assert rows_for(tiny, 9, longest, SamplingParams(30)) == 9
    assert rows_for(tiny, 9, longest, SamplingParams(30, max_kv_tokens=4 * (longest + 30))) == 4
    assert rows_for(tiny, 9, longest, SamplingParams(30, max_kv_tokens=5)) == 1


def test_the_bound_has_no_effect_on_models_whose_rows_begin_together():
    assert rows_for(random_policy("mamba"), 9, 20, SamplingParams(30, max_kv_tokens=5)) == 9
