"""`sample_in_turn` and `grow_sample` give the completions of `sample_groups`."""

import pytest
from architectures import random_policy

from grpo_actors.policy.decoding.batching import PREFILLED
from grpo_actors.policy.decoding.sampling import (
    SamplingParams,
    Submission,
    grow_sample,
    sample_groups,
    sample_in_turn,
)

PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 4], [9, 9, 8, 7, 6, 5, 4], [3]]
SEEDS = [[10, 11], [20], [30, 31], [40]]
PARAMS = SamplingParams(20, repetition_penalty=1.1)

#: A plain cache, a sliding window, and a model whose ragged prompts share no batch.
FAMILIES = ["qwen2", "gemma3_text", "mamba"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_rows", [1, 3, 50])
def test_every_group_is_yielded_once_with_the_tokens_it_has_alone(family, max_rows):
    policy = random_policy(family)
    counted = []
    groups = map(Submission, range(4), PROMPTS, SEEDS)
    done = list(sample_in_turn(policy, groups, PARAMS, max_rows, counted.append))
    assert sorted(key for key, _ in done) == [0, 1, 2, 3]
    for key, samples in done:
        [alone] = sample_groups(policy, [PROMPTS[key]], [SEEDS[key]], PARAMS)
        assert [sample.tokens for sample in samples] == [sample.tokens for sample in alone]
    assert sum(counted) == sum(len(sample.tokens) for _, samples in done for sample in samples)


def test_groups_are_requested_as_rows_become_free_and_not_all_at_once():
    asked = []

    def source():
        for key in range(30):
            asked.append(key)
            yield Submission(key, PROMPTS[key % 4], [key])

    running = sample_in_turn(random_policy("qwen2"), source(), PARAMS, max_rows=2)
    first, _ = next(running)
    assert len(asked) == 2 + PREFILLED, "two rows, and the prompts of one prefill"
    assert sorted([first, *(key for key, _ in running)]) == list(range(30))


@pytest.mark.parametrize("family", FAMILIES)
def test_without_groups_nothing_is_yielded(family):
    assert list(sample_in_turn(random_policy(family), [], PARAMS, max_rows=2)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_completion_can_be_watched_token_by_token(family):
    policy = random_policy(family)
    [[whole]] = sample_groups(policy, [PROMPTS[0]], [[7]], PARAMS)
    lengths = []
    for sample in grow_sample(policy, PROMPTS[0], 7, PARAMS):
        lengths.append(len(sample.tokens))
        assert sample.tokens == whole.tokens[: len(sample.tokens)]
    assert lengths == list(range(1, len(whole.tokens) + 1))
    assert sample.finished == whole.finished


def test_completions_of_several_turns_are_refilled_too(tiny):
    prompts = [tiny.chat.encode([{"role": "user", "content": f"What is {n} + 5?"}]) for n in range(9)]
    reply = tiny.tokenizer.encode("<|user|>And 5 more?<|end|><|assistant|>", add_special_tokens=False)

    def once(sample):
        return None if sample.spans else reply

    params = SamplingParams(60)
    groups = [
        Submission(key, prompt, [key], None if key % 3 == 2 else once) for key, prompt in enumerate(prompts)
    ]
    done = dict(sample_in_turn(tiny, groups, params, max_rows=2))
    for key, prompt, seeds, respond in groups:
        [alone] = sample_groups(tiny, [prompt], [seeds], params, responds=[respond])
        assert [sample.tokens for sample in done[key]] == [sample.tokens for sample in alone]
        assert bool(done[key][0].spans) == bool(alone[0].spans)
    assert sum(bool(samples[0].spans) for samples in done.values()) >= 4


def test_prompts_that_may_not_be_padded_share_a_batch_if_they_are_equally_long():
    groups = [Submission(key, prompt, [key]) for key, prompt in enumerate([[1, 2], [3, 4], [5, 6], [7], [8]])]
    counted = []
    done = dict(sample_in_turn(random_policy("mamba"), groups, PARAMS, 4, counted.append))
    assert len(done) == 5
    assert max(counted) == counted[0] == 3
