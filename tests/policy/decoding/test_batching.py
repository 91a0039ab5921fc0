"""Continuous batching: a completion does not depend on which others share the batch, nor on when it gets a row."""

import functools

import numpy as np
import pytest
from architectures import random_policy

from grpo_actors.config import ModelConfig
from grpo_actors.policy.decoding import window
from grpo_actors.policy.decoding.batching import PREFILLED, Sampler
from grpo_actors.policy.decoding.fixed_batch import next_batch
from grpo_actors.policy.decoding.rows import Group
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


def test_free_rows_are_dropped_once_a_quarter_of_them_is_free(tiny):
    tiny.stop_tokens = frozenset()
    sampler, held = Sampler(tiny, SamplingParams(30), max_rows=8), []
    for key in range(8):
        sampler.submit(key, [5, 7, 9], [key])
    for key in range(4):
        sampler.step()
        held.append(len(sampler._rows))
        sampler.drop(key)
    assert held == [8, 8, 6, 6]  # of 8 rows, 7 and then 6 were in use; of 6, then 5


def test_a_single_completion_that_comes_later_gets_a_row_of_its_own(tiny):
    tiny.stop_tokens = frozenset()
    sampler, counts = Sampler(tiny, SamplingParams(30), max_rows=2), []
    for key in (0, 1):
        sampler.submit(key, [5, 7, 9], [key])
        counts += [sampler.step()[0] for _ in range(2)]
    assert counts == [0, 1, 1, 2]


def test_a_free_row_waits_for_others_until_one_in_sixteen_is_free(tiny):
    tiny.stop_tokens = frozenset()
    sampler = Sampler(tiny, SamplingParams(30), max_rows=32)
    for key, seeds in enumerate([range(30), [31], [32]]):
        sampler.submit(key, [5, 7, 9], seeds)
    sampler.step()
    waiting = sampler.submit(3, [5, 7], [33, 34])
    begun = []
    for dropped in (1, 2):
        sampler.drop(dropped)
        sampler.step()
        sampler.step()
        begun.append([bool(sample.tokens) for sample in waiting])
    assert begun == [[False, False], [True, True]]


def test_the_prompts_of_one_prefill_are_a_bounded_number(tiny):
    tiny.stop_tokens = frozenset()
    sampler = Sampler(tiny, SamplingParams(30), max_rows=50)
    for key in range(PREFILLED + 4):
        sampler.submit(key, [5, 7, key + 9], [key])
    # The first step starts the first tokens, and each further one reads those of the step before it.
    assert [sampler.step()[0] for _ in range(3)] == [0, PREFILLED, PREFILLED + 4]


def test_rows_that_begin_together_hold_as_many_whole_groups_as_fit_and_at_least_one():
    policy = random_policy("mamba")
    waiting = [Group(key, [3, 4], range(size), [], None) for key, size in enumerate((2, 3, 1))]
    batches = {rows: [group.key for group in next_batch(policy, waiting, rows)] for rows in (1, 4, 5, 6)}
    assert batches == {1: [0], 4: [0], 5: [0, 1], 6: [0, 1, 2]}


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
